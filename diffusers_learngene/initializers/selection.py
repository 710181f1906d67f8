# SPDX-License-Identifier: Apache-2.0
"""Selection from the ancestry: whole layers for another depth, evenly spread elements for another width.

Layers are taken by nearest relative depth (`functional.resize.relative_layers`), the output of every residual branch
scaled by `gain`: cutting layers out of a residual network without it is a needlessly weak baseline. Elements are taken
as Weight Selection does (Xu et al., ICLR 2024, arXiv 2311.18823): along every axis n -> n', index round(i (n-1) /
(n'-1)), or every (n / n')-th where that is whole. It works from large to small; a wider model repeats elements.
"""

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.models import empty_model, model_config, prepare_ancestry_
from ..anatomy.sizes import override_config
from ..functional.resize import relative_layers
from ..learngene.layout import layout_of, stack, unstack


def selection(ancestry: nn.Module, overrides: dict, *, gain: float = 1.0) -> nn.Module:
    """A model of another size made of layers and elements of the ancestry.

    Args:
        ancestry: the model to take from; it is not changed.
        overrides: config overrides of the new size.
        gain: factor on the output of every residual branch; L / L' keeps their sum when the depth changes.

    Raises:
        ValueError: an override that the config does not have or the class refuses, or a tensor the ancestry lacks.
    """
    architecture = type(ancestry).__name__
    model = empty_model(architecture, override_config(architecture, model_config(ancestry), overrides))
    anatomy = Anatomy.of(prepare_ancestry_(ancestry))
    source, target = layout_of(anatomy), layout_of(Anatomy.of(model))
    tensors = stack(anatomy.tensors, source)
    chosen = {}
    for key, entry in target.entries.items():
        if key not in source.entries:
            raise ValueError(f"{architecture} of the ancestry's size has no {key!r} to select from.")
        value = tensors[key]
        if not key.startswith("shared."):
            name = target.stack_of[key]
            layers = relative_layers(source.depths[name], target.depths[name])
            members = list(source.entries[key].names)
            value = value[[min(range(len(members)), key=lambda i: abs(members[i] - layers[at])) for at in entry.names]]
        for axis in range(len(entry.shape)):
            value = _select(value, value.ndim - len(entry.shape) + axis, entry.shape[axis])
        chosen[key] = entry.scaled(value, lambda _: gain)
    state = {name: tensor.clone() for name, tensor in unstack(chosen, target).items()}
    model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.requires_grad_(True)


def _select(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Evenly spread elements along one axis."""
    length = tensor.shape[axis]
    if length == size:
        return tensor
    if length % size == 0:
        index = torch.arange(size) * (length // size)
    else:
        index = torch.linspace(0, length - 1, size).round().long()
    return tensor.index_select(axis, index)
