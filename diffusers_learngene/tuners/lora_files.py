# SPDX-License-Identifier: Apache-2.0
"""The file in which diffusers keeps the LoRAs of a pipeline: those of all its components, told apart by prefixes.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight, ..., text_encoder. ...
    metadata: {"transformer.r": 4, ..., "text_encoder.r": 8, ...}

A pipeline's loader reads what `_lora_loadable_modules` of its class names; Wan's second transformer alone it reads
from a file of its own, under the first one's prefix (`load_lora_weights(..., load_into_transformer_2=True)`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..hub.files import write_tensors


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# As in diffusers.loaders.lora_base, whose import takes seconds.
LORA_WEIGHT_NAME_SAFE = "pytorch_lora_weights.safetensors"
LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"
# Component -> prefix under which its loader looks for it, and file.
_OWN_FILES = {"transformer_2": ("transformer", LORA_WEIGHT_NAME_SAFE.replace(".", "_2."))}


def place_of(component: str, pipeline: "DiffusionPipeline | type | None" = None) -> tuple[str, str]:
    """Prefix and file name of a component's LoRA.

    Args:
        pipeline: that is to load it, or its class; None: any of diffusers.

    Raises:
        ValueError: the loader of the pipeline, or any of diffusers', knows no such component.
    """
    if pipeline is None:
        from diffusers.loaders import lora_pipeline

        loaders = [value for value in vars(lora_pipeline).values() if isinstance(value, type)]
        known = sorted({name for cls in loaders for name in getattr(cls, "_lora_loadable_modules", ())})
        whose = "diffusers' pipelines"
    else:
        cls = pipeline if isinstance(pipeline, type) else type(pipeline)
        known, whose = list(getattr(cls, "_lora_loadable_modules", [])), cls.__name__
    if component not in known:
        raise ValueError(f"component={component!r}: {whose} load LoRAs into {known} alone.")
    return _OWN_FILES.get(component, (component, LORA_WEIGHT_NAME_SAFE))


def write_component(
    folder: Path, place: tuple[str, str], tensors: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """Write a component's LoRA into the file, of which the other components' stay what they are.

    Raises:
        ValueError: there is a file already that is none of diffusers', or that has LoRAs without a config, which one
            for this component alone would make diffusers read wrongly.
    """
    prefix, name = place[0] + ".", place[1]
    others, configs = _others(folder / name, prefix) if (folder / name).exists() else ({}, {})
    # With the config, because readers who have to guess it from the tensors may take one alpha for all ranks.
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    configs |= {prefix + key: value for key, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(configs, sort_keys=True)}
    write_tensors(folder / name, others | {prefix + key: tensor for key, tensor in tensors.items()}, metadata)


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of the adapters in a file of diffusers'; {} if it has none.

    Raises:
        ValueError: no safetensors file, or a config that is no JSON object.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
        config = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file with adapters: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} has the config {text[:100]!r}, which is no JSON object.")
    return config


def _others(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configs of the other components in a file."""
    configs = {key: value for key, value in read_config(path).items() if not key.startswith(prefix)}
    with safe_open(path, framework="pt") as file:
        names: Sequence[str] = [name for name in file.keys() if not name.startswith(prefix)]  # noqa: SIM118 (no dict)
        tensors = {name: file.get_tensor(name) for name in names}
    described = tuple({key.partition(".")[0] + "." for key in configs})
    if alone := [name for name in names if not name.startswith(described)]:
        raise ValueError(
            f"{path} holds LoRAs without a config, such as {alone[0]}: diffusers would read them wrongly with one for "
            f"{prefix.rstrip('.')} beside them. Write to another folder."
        )
    return tensors, configs
