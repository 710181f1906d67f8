# SPDX-License-Identifier: Apache-2.0
"""A model whose matrices are generated, made of templates and size tensors: what descending comes down to."""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from .blocks import group_modules
from .layout import Layout
from .models import empty_model
from .tuners.base_model import shared_groups
from .tuners.wave import WAVEConfig


def generated_model(
    architecture: str,
    config: dict,
    template_pattern: dict[str, list[int]],
    layout: Layout,
    tensors: dict[str, Tensor],
    templates: dict[str, Tensor],
) -> PeftModel:
    """A PeftModel (mode="generate") with these tensors; nothing dense is ever allocated for the factored matrices.

    Scalers, and biases and norms of the blocks, are trainable.
    """
    model = empty_model(architecture, config)
    factored = [entry for entry in layout.entries.values() if entry.group]
    group_of = {name.removesuffix(".weight"): e.group or "" for e in factored for name in e.names.values()}
    fused = any("+" in key for key in template_pattern)
    # A group's key counts variants of a role among the targets, which are the matrices of all layers in a learngene.
    pattern = {g.key: template_pattern[group_of[g.matrices[0].name]] for g in group_modules(model, group_of, fused)}
    adapter = WAVEConfig(mode="generate", target_modules=list(group_of), template_pattern=pattern, share_qkv=fused)
    peft_model = get_peft_model(model, adapter, low_cpu_mem_usage=True)

    state: dict[str, Tensor] = {}
    for group in shared_groups(model).values():
        owner = next(iter(group.layers))
        state[f"{owner}.learngene_wave_bank.default.templates"] = templates[group_of[owner]].clone()
    trainable = set()
    for key, entry in layout.entries.items():
        shared = key.startswith("shared.")
        slices = [tensors[key]] if shared else tensors[key].unbind()
        for name, tensor in zip(entry.names.values(), slices, strict=True):
            path, _, attribute = name.rpartition(".")
            if entry.group:
                state[f"{path}.base_layer.weight"] = torch.empty(0)  # dropped, but no longer a meta tensor
                name = f"{path}.learngene_wave_scaler.default.weight"
            elif hasattr(model.get_submodule(path), "base_layer"):
                name = f"{path}.base_layer.{attribute}"
            state[name] = tensor.detach().clone()
            if entry.group or (tensor.ndim == 1 and not shared):
                trainable.add(name)
    model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return peft_model
