# SPDX-License-Identifier: Apache-2.0
"""A model whose matrices are generated, made of a bank and size tensors: what descending comes down to."""

from collections.abc import Mapping, Sequence

from peft import PeftModel, get_peft_model
from torch import Tensor

from .artefact import ArtefactConfig
from .blocks import group_modules
from .layout import Layout
from .methods import Bank
from .models import empty_model
from .tuners.base_model import shared_groups


def generated_model(
    description: ArtefactConfig,
    config: dict,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    bank: Mapping[str, Bank],
    origin: Mapping[str, Tensor] | None = None,
) -> PeftModel:
    """A PeftModel with these tensors; nothing dense is ever allocated for the factored matrices (mode="generate").

    Scalers, and biases and norms of the blocks, are trainable.

    Args:
        config: of the base model.
        layout: of the base model; `tensors` and `bank` are of its size.
        origin: weights, by name, that the factored matrices are added to (mode="add") instead of replacing them.
    """
    method, sizes = description.factors, description.bank_sizes
    model = empty_model(description.architecture, config)
    factored = [entry for entry in layout.entries.values() if entry.group]
    group_of = {name.removesuffix(".weight"): e.group or "" for e in factored for name in e.names.values()}
    fused = any("+" in key for key in sizes)
    # A group's key counts variants of a role among the targets, which are the matrices of all layers in a learngene.
    pattern = {g.key: sizes[group_of[g.matrices[0].name]] for g in group_modules(model, group_of, fused)}
    adapter = method.config(pattern, list(group_of), fused, "generate" if origin is None else "add")
    peft_model = get_peft_model(model, adapter, low_cpu_mem_usage=True)

    prefix = f"learngene_{method.name}"
    state: dict[str, Tensor] = {}
    for group in shared_groups(model).values():
        owner = next(iter(group.layers))
        for name, tensor in bank[group_of[owner]].items():
            state[f"{owner}.{prefix}_bank.default.{name}"] = tensor.detach().clone()
    trainable = set()
    for key, entry in layout.entries.items():
        shared = key.startswith("shared.")
        own: Sequence[Tensor | None] = [None] * len(entry.names)  # k and v, whose scaler is q's
        if layout.owns(key):
            own = [tensors[key]] if shared else list(tensors[key].unbind())
        for name, part in zip(entry.names.values(), own, strict=True):
            path, _, attribute = name.rpartition(".")
            if entry.group:
                if origin:
                    state[f"{path}.base_layer.weight"] = origin[name].clone()
                name = f"{path}.{prefix}_{method.scaler_name}.default.weight"
            elif hasattr(model.get_submodule(path), "base_layer"):
                name = f"{path}.base_layer.{attribute}"
            if part is not None:
                state[name] = part.detach().clone()
                if entry.group or (part.ndim == 1 and not shared):
                    trainable.add(name)
    model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return peft_model
