# SPDX-License-Identifier: Apache-2.0
"""A model whose matrices are generated, made of a bank and size tensors; and the tensors back from such a model.

What descending comes down to, and its inverse. KIND's novel tailors are an adapter that is added to the generated one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..anatomy import Anatomy, handed_on
from ..anatomy.dit import LABEL_ROWS, train_label_rows_
from ..tuners.base_config import LearngeneConfig, Mode
from ..tuners.base_model import shared_groups
from ..tuners.kind.classes import ClassTailors, Sizes
from ..tuners.own_tensors import with_stars
from ..tuners.scalers import adapted_layers, adapter_config
from .artefact import ArtefactConfig
from .layout import Layout
from .methods import Bank, Method


ADAPTER, NOVEL = "default", "novel"  # names of the generating adapter, and of that with the tailors of new classes


def generated_model(
    description: ArtefactConfig,
    anatomy: Anatomy,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    bank: Mapping[str, Bank],
    origin: Mapping[str, Tensor] | None = None,
) -> PeftModel:
    """A PeftModel with these tensors; nothing dense is ever allocated for the factored matrices (mode="generate").

    Scalers, and biases and norms of the blocks, are trainable; where layers have banks of their own, everything is.
    The adapter's config says so, so that its file holds all of it.

    Args:
        anatomy: of the base model, which is empty (`ArtefactConfig.skeleton`) and is filled in place.
        layout: of the base model; `tensors` and `bank` are of its size.
        origin: weights, by name, that the factored matrices are added to (mode="add") instead of replacing them.
    """
    method: Method = description.factors
    model: Any = anatomy.model
    mode: Mode = "add" if origin else "generate"
    sizes, tailors, trained = description.bank_sizes, description.class_tailors, _trained(anatomy, layout, method)
    adapter = _adapter(description, anatomy, layout, sizes, mode, tailors, trained, freeze_bank=not method.per_layer)
    with handed_on(anatomy):
        peft_model = get_peft_model(model, adapter, adapter_name=ADAPTER, low_cpu_mem_usage=True)

    stored = {**tensors, **{f"{name}.{key}": tensor for key, own in bank.items() for name, tensor in own.items()}}
    state: dict[str, Tensor] = {}
    for name, (key, index) in _places(model, layout, method, ADAPTER).items():
        value = stored[key] if index is None else stored[key][index]
        state[name] = value.detach().clone()
    if origin:
        names = [name for entry in layout.entries.values() if entry.group for name in entry.names.values()]
        state |= {f"{name.removesuffix('.weight')}.base_layer.weight": origin[name].clone() for name in names}
    model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return peft_model


def add_classes_(
    peft_model: PeftModel, description: ArtefactConfig, layout: Layout, sizes: Sizes, count: int, seed: int
) -> PeftModel:
    """Give the last `count` classes of a generated model tailors, in place, of sigma = 0: nothing changes yet.

    Only these, and the label rows of these classes, are trainable.

    Args:
        layout: of the base model.
        sizes: [0, num_tailors] by group; groups without new tailors are not adapted.
        seed: of u and v.
    """
    model = peft_model.get_base_model()
    sizes = {key: size for key, size in sizes.items() if sum(size)}
    old: ClassTailors = [None if units is None else [] for units in (description.class_tailors or ())[:-count]]
    # What the learngene knows stays as it is, whatever is activated when, and needs no file of its own.
    adapter_config(model, ADAPTER).tensors_to_save = None
    for layer in adapted_layers(model, ADAPTER).values():
        layer.frozen_peft_weight_names[ADAPTER] = layer.adapter_layer_names
    model.requires_grad_(False)
    train_label_rows_(model, len(old), count)
    anatomy, names = Anatomy.of(model), list(model.state_dict(keep_vars=True))
    tailors: ClassTailors = [*old, *([unit] for unit in range(count))]
    rows = with_stars([name for name in names if name.endswith(LABEL_ROWS)], names)
    with handed_on(anatomy), torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model.add_adapter(NOVEL, _adapter(description, anatomy, layout, sizes, "add", tailors, rows))
    # The new one first: who asks for *the* active adapter, as HF's Trainer does, means the one that trains.
    peft_model.base_model.set_adapter([NOVEL, ADAPTER])
    return peft_model


def _trained(anatomy: Anatomy, layout: Layout, method: Method) -> list[str]:
    """Patterns of what a descendant trains beside its bank and scalers: vectors of the blocks, or the whole model.

    By every name that a tensor has, because the model that a file is loaded into may not have tied what is tied here;
    and the statistics of batch norms, which training moves wherever they are.
    """
    names = {
        name
        for key, entry in layout.entries.items()
        if not entry.group and (method.per_layer or (key.startswith("layers.") and len(entry.shape) == 1))
        for name in entry.names.values()
    }
    tensors = anatomy.model.state_dict(keep_vars=True)
    trained = {id(tensors[name]) for name in names if isinstance(tensors[name], nn.Parameter)}
    statistics = {
        f"{path}.{name}"
        for path, module in anatomy.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    return with_stars({n for n, tensor in tensors.items() if id(tensor) in trained or n in statistics}, tensors)


def gathered(model: nn.Module, layout: Layout, method: Method, adapter_name: str = ADAPTER) -> dict[str, Tensor]:
    """The tensors that an adapter and the rest of a generated model were made of: by layout key, and of the banks."""
    parts: dict[str, list[tuple[int | None, Tensor]]] = {}
    for name, (key, index) in _places(model, layout, method, adapter_name).items():
        path, _, attribute = name.rpartition(".")
        value = getattr(model.get_submodule(path), attribute)  # no parameter, where it is parametrized
        parts.setdefault(key, []).append((index, value.detach().float().cpu()))
    return {
        key: own[0][1].clone() if own[0][0] is None else torch.stack([tensor for _, tensor in sorted(own, key=_first)])
        for key, own in parts.items()
    }


def adapter_sizes(model: nn.Module, layout: Layout, adapter_name: str) -> dict[str, list[int]]:
    """Size of the bank of every group that an adapter of a generated model has."""
    config = adapter_config(model, adapter_name)
    group_of = layout.groups_of({entry.group for entry in layout.entries.values() if entry.group})
    targets = {name: group_of[name] for name in adapted_layers(model, adapter_name)}
    groups = Anatomy.of(model).groups_of(targets, config.share_qkv)
    return {targets[group.matrices[0].name]: list(config.size_of(group)) for group in groups}


def _first(pair: tuple[int | None, Tensor]) -> int:
    return pair[0] or 0


def _places(model: nn.Module, layout: Layout, method: Method, adapter_name: str) -> dict[str, tuple[str, int | None]]:
    """Key of a tensor, and index along its first axis (None: the whole), by its name in a generated model."""
    prefix = f"learngene_{method.name}"
    place = {
        name.removesuffix(".weight"): (entry.group, index)
        for entry in layout.entries.values()
        if entry.group
        for index, name in enumerate(entry.names.values())
    }
    found: dict[str, tuple[str, int | None]] = {}
    adapted: set[str] = set()
    for shared in shared_groups(model, adapter_name).values():
        adapted |= shared.layers.keys()
        owner = next(iter(shared.layers))
        group, index = place[owner]
        for name in method.bank_tensors:
            place_of = f"{name}.{group}", index if method.per_layer else None
            found[f"{owner}.{prefix}_bank.{adapter_name}.{name}"] = place_of
    for key, entry in layout.entries.items():
        if not layout.owns(key):
            continue
        for index, name in enumerate(entry.names.values()):
            path, _, attribute = name.rpartition(".")
            if entry.group:
                if path not in adapted:
                    continue
                name = f"{path}.{prefix}_{method.scaler_name}.{adapter_name}.weight"
            elif hasattr(model.get_submodule(path), "base_layer"):
                name = f"{path}.base_layer.{attribute}"
            found[name] = key, None if key.startswith("shared.") else index
    return found


def _adapter(
    description: ArtefactConfig,
    anatomy: Anatomy,
    layout: Layout,
    sizes: Sizes,
    mode: Mode,
    class_tailors: ClassTailors | None,
    tensors_to_save: list[str],
    freeze_bank: bool = False,
) -> LearngeneConfig:
    """Config of the adapter that makes the matrices of these groups."""
    by_group = {key: list(size) for key, size in sizes.items()}
    group_of = layout.groups_of(by_group)
    fused = any("+" in key for key in description.bank_sizes)
    # A group's key counts variants of a role among the targets, which are the matrices of all layers in a learngene.
    pattern = {g.key: by_group[group_of[g.matrices[0].name]] for g in anatomy.groups_of(group_of, fused)}
    fields: dict[str, Any] = {"mode": mode, "target_modules": list(group_of), "share_qkv": fused}
    fields |= {"tensors_to_save": tensors_to_save or None, "freeze_bank": freeze_bank}
    return description.factors.config(pattern, class_tailors, **fields)
