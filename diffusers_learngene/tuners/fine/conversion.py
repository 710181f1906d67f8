# SPDX-License-Identifier: Apache-2.0
"""An added FINE adapter as the LoRA that it is.

    W + U[rows] diag(sigma) V^T  =  W + B A,     A = diag(scale sigma) V^T,  B = U[rows],  r = lora_alpha

Nothing is approximated. (PEFT's own `convert_to_lora` takes the SVD of every matrix and has no hook to avoid it.) What
is lost is the sharing: a LoRA holds U and V once for every layer.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.blocks import form_of, matrix_to_weight
from ...functional import fine
from ...hub.files import write_tensors
from ..lora_files import place_of, write_component
from ..scalers import PREFIX, adapted_layers, adapter_config, target_modules
from .config import FINEConfig


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@torch.no_grad()
def to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA that is exactly an added FINE adapter, at its current scale.

    Args:
        model: a PeftModel, or a model that an adapter was injected into.

    Returns:
        The config, and the tensors under the names that they have in a PEFT file, with what else the adapter trained
        (`bias`, `modules_to_save`).

    Raises:
        ValueError: the model has no such adapter, it is not a FINE adapter that is added to weights, it trained
            `tensors_to_save`, or a convolution pads with something else than zeros, as no LoRA does.
    """
    config = adapter_config(model, adapter_name)
    if not isinstance(config, FINEConfig):
        raise ValueError(
            f"Adapter {adapter_name!r} is a {type(config).__name__}: only FINE's are LoRAs. PEFT's convert_to_lora "
            "approximates others."
        )
    if config.mode != "add":
        raise ValueError(
            f'Adapter {adapter_name!r} has mode="{config.mode}": it replaces weights, and a LoRA is added to them. '
            "merge_and_unload() makes a plain model of it."
        )
    if config.tensors_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has trained tensors_to_save={config.tensors_to_save}, which a LoRA has no "
            "place for: merge_and_unload() makes a plain model of it."
        )
    layers = adapted_layers(model, adapter_name)
    state = {
        (name if name.startswith(PREFIX) else PREFIX + name): tensor.clone()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if ".learngene_fine_" not in name
    }
    ranks = {}
    for name, layer in layers.items():
        bank: Any = layer.bank(adapter_name)
        offset, base = layer.offsets[adapter_name], layer.get_base_layer()
        sigma = layer.scaler(adapter_name)() * layer.scaling[adapter_name]
        a, b = fine.to_lora(sigma, bank.u[offset : offset + layer.out_features], bank.v)
        if isinstance(base, nn.Conv2d):
            if base.padding_mode != "zeros":
                raise ValueError(f"{name} has padding_mode={base.padding_mode!r}: PEFT's LoRA pads with zeros.")
            a, b = matrix_to_weight(a, form_of(base)), matrix_to_weight(b, form_of(base))
        # Every layer's own, and in order, as files want them.
        for key, factor in (("A", a), ("B", b)):
            state[f"{PREFIX}{name}.lora_{key}.weight"] = factor.clone(memory_format=torch.contiguous_format)
        ranks[name] = bank.rank
    (rank, _), *_ = Counter(ranks.values()).most_common()
    # Anchored, because PEFT matches the ends of names as well.
    pattern = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=target_modules(model, list(ranks)),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        bias="lora_only" if config.bias == "learngene_only" else config.bias,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    return lora, state


def save_as_lora(
    model: nn.Module,
    save_directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    component: str | None = None,
    pipeline: "DiffusionPipeline | type | None" = None,
) -> None:
    """Write an added FINE adapter as a LoRA that needs nothing of this package.

    Args:
        model: as in `to_lora`.
        save_directory: folder, made if there is none.
        component: None writes what `PeftModel.from_pretrained` reads (`adapter_config.json` and
            `adapter_model.safetensors`); the model's name in a pipeline ("transformer", "unet", "text_encoder") writes
            what the pipeline's `load_lora_weights` reads (`pytorch_lora_weights.safetensors`), into a file that may
            hold other components' already. Of Wan 2.2, "transformer_2" has one of its own, to be loaded with
            `weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True`.
        pipeline: that is to load it, or its class, in order to check that it loads this component.

    Raises:
        ValueError: as in `to_lora`; or diffusers' file would have to hold what is no LoRA, or what its loader leaves
            out without a word.
    """
    place = None if component is None else place_of(component, pipeline)
    config, state = to_lora(model, adapter_name)
    folder = Path(save_directory)
    if place is None:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, state, {"format": "pt"})
        return
    if others := [name for name in state if ".lora_" not in name]:
        raise ValueError(f"diffusers loads LoRAs alone, but bias or modules_to_save trained {others} as well.")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    write_component(folder, place, tensors, config.to_dict())
