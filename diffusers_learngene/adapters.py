# SPDX-License-Identifier: Apache-2.0
"""Add, save and load learngene adapters on any model, without wrapping it in a `PeftModel`.

Many diffusers models (DiT, PixArt, HunyuanDiT, Latte, ...) lack `PeftAdapterMixin`, and the loaders of those that have
it build LoRAs only. The folder is PEFT's own: `PeftModel.from_pretrained` reads what `save_adapter` wrote, and
`load_adapter` reads what `PeftModel.save_pretrained` wrote.

Loading is strict where PEFT is lenient: every tensor that the config asks for must be there, of its shape and finite,
and nothing else; no pickle is read; and all of it is checked before the model is touched.
"""

import copy
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .hub.files import write_tensors
from .integrations import learngene_config_class
from .tuners.base_config import LearngeneConfig
from .tuners.lora_files import read_config
from .tuners.peft_types import LearngenePeftType
from .tuners.scalers import PREFIX, check_tensors
from .tuners.weighted import WeightedSum


__all__ = ["add_adapter", "add_weighted_adapter", "load_adapter", "save_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def add_adapter(model: Model, config: LearngeneConfig, adapter_name: str = "default") -> Model:
    """Add an adapter to the model, in place, and make it the active one.

    Args:
        model: any model; it keeps its class.
        config: of the adapter, e.g. `WAVEConfig()` or `FINEConfig()`.
        adapter_name: a name that the model does not have yet.

    Returns:
        The model.

    Raises:
        ValueError: the name is taken or has a dot in it, or the config does not fit the model.
    """
    return _inject(model, config, adapter_name, low_cpu_mem_usage=False)


def add_weighted_adapter(model: Model, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> Model:
    """Add the weighted sum of adapters, exactly, as a new adapter, in place, and make it the active one.

    Args:
        model: with the adapters; it keeps its class.
        adapters: names. They may have other targets and sizes; their modes have to be the same.
        weights: one number each; the adapters' present scales count as well.
        adapter_name: a name that the model does not have yet.

    Returns:
        The model.

    Raises:
        ValueError: the name is taken or has a dot in it, or there is no such sum (`tuners.weighted.WeightedSum`).
    """
    _configs(model)  # refuses a PeftModel, which has this as a method
    weighted = WeightedSum(model, adapters, weights)
    _inject(model, weighted.config, adapter_name, low_cpu_mem_usage=False)
    weighted.fill_(model, adapter_name)
    return model


def save_adapter(model: nn.Module, save_directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter to a folder: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    config = _configs(model).get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter {adapter_name!r} to save, only {sorted(_configs(model))}.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.inference_mode = True  # as PEFT: what is loaded is not trained, unless it is asked for
    config.save_pretrained(str(folder))
    write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, _state_dict(model, adapter_name), {"format": "pt"})


def load_adapter(
    model: Model,
    source: str | os.PathLike,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Model:
    """Load an adapter into the model, in place, and make it the active one.

    Args:
        model: any model of the kind that the adapter was made for; it keeps its class.
        source: a folder, or a repository on the Hub; also one that diffusers' `save_lora_adapter` wrote, which
            diffusers itself reads of LoRAs alone.
        adapter_name: a name that the model does not have yet; not necessarily the one it was saved under.
        trainable: whether to go on training it.
        subfolder: folder inside `source`.
        revision: branch, tag or commit on the Hub.
        token: of the Hub.

    Returns:
        The model.

    Raises:
        ValueError: the config or the tensors are not those of an adapter for this model. The message names the key,
            and the model is as it was.
    """
    config, path, tensors = _read(source, subfolder, revision, token)
    config.inference_mode = not trainable
    skeleton = _inject(_skeleton(model), copy.deepcopy(config), adapter_name, low_cpu_mem_usage=True)
    check_tensors(path, tensors, _state_dict(skeleton, adapter_name))
    _inject(model, config, adapter_name, low_cpu_mem_usage=True)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=True)
    return model


def _configs(model: nn.Module) -> dict[str, LearngeneConfig]:
    if isinstance(model, PeftModel):
        raise ValueError("A PeftModel has methods of its own: add_adapter, load_adapter and save_pretrained.")
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _inject(model: Model, config: LearngeneConfig, adapter_name: str, low_cpu_mem_usage: bool) -> Model:
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must be a name without dots.")
    if adapter_name in _configs(model):
        raise ValueError(f"There is an adapter {adapter_name!r} already: choose another adapter_name.")
    before = dict(_configs(model))
    try:
        with warnings.catch_warnings():  # another adapter is what was asked for
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    except BaseException:
        if before:
            _configs(model).pop(adapter_name, None)
        raise
    if hasattr(model, "_hf_peft_config_loaded"):  # diffusers' and transformers' own methods ask for this
        setattr(model, "_hf_peft_config_loaded", True)  # noqa: B010 (to mypy, a module holds modules and tensors)
    return model


def _state_dict(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT gives them in a file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {PREFIX + name: tensor for name, tensor in state.items()}


def _skeleton(model: Model) -> Model:
    """A copy of the model on the meta device."""
    memo: dict[int, object] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _read(
    source: str | os.PathLike, subfolder: str | None, revision: str | None, token: str | bool | None
) -> tuple[LearngeneConfig, str, dict[str, Tensor]]:
    """Config of an adapter, the file of its tensors, and these."""
    where = (subfolder, revision, token)
    described = _find(source, CONFIG_NAME, *where)
    path = _find(source, SAFETENSORS_WEIGHTS_NAME if described else LORA_WEIGHT_NAME_SAFE, *where)
    if path is None and described is None:
        raise ValueError(f"There is no {CONFIG_NAME} in {os.path.join(source, subfolder or '')}.")
    if path is None:
        raise ValueError(
            f"There is no {SAFETENSORS_WEIGHTS_NAME} in {source}. Pickled weights (.bin, .pt) are never read: convert "
            "them to safetensors."
        )
    values = _json(described) if described else read_config(path)
    if not described and any("." in key for key in values):
        raise ValueError(
            f"{path} holds the LoRAs of a pipeline's components: load it with the pipeline's load_lora_weights. "
            "(Adapters of other methods are saved by save_adapter, or by save_lora_adapter of the model.)"
        )
    config = _config_of(values, described or path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    # diffusers leaves the prefix out.
    prefix = "" if described else PREFIX
    return config, path, {prefix + name: tensor for name, tensor in tensors.items()}


def _find(
    source: str | os.PathLike, name: str, subfolder: str | None, revision: str | None, token: str | bool | None
) -> str | None:
    """Path of a file of a folder or a repository, if it is there."""
    if os.path.isdir(source):
        path = os.path.join(source, subfolder or "", name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(str(source), name, subfolder=subfolder, revision=revision, token=token)
    except EntryNotFoundError:
        return None


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _config_of(values: Any, path: str) -> LearngeneConfig:
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise ValueError(f"{path} is not the config of an adapter: it has no peft_type.")
    config_cls = learngene_config_class(values["peft_type"])
    if config_cls is None:
        raise ValueError(
            f"{path} has peft_type={values['peft_type']!r}, which is none of {list(LearngenePeftType.__members__)}."
        )
    unknown = values.keys() - {field.name for field in fields(config_cls)}
    if unknown:
        raise ValueError(f"{path} has the unknown keys {sorted(unknown)}: a newer version may have written it.")
    return config_cls(**values)
