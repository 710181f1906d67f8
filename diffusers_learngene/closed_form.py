# SPDX-License-Identifier: Apache-2.0
"""An ancestry model's tensors -> templates and size tensors, in closed form: the start of condensing.

The truncated SVD (`functional.wave.factorize`) is the best approximation of the *weights*, and a bad one of the
*model*: trained weights are mostly their random initialisation, of which layers share nothing, so the optimum is a
mean of functions that none of the layers computes. Whole layers are worse in the weights and better in the model: the
templates hold as many layers as fit (two, with the default number of templates), each layer starts as the nearest of
them, and templates that are left over approximate what is missing. On the digits, distillation from there reached in
200 steps what it took 400 to reach from the SVD (one seed). Both are exact once there are templates enough.
"""

import copy

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from . import blocks
from .functional import wave
from .layout import Entry, Layout, layout_of, stack
from .models import tensors_of
from .tuners.wave import WAVEConfig


def closed_form(
    model: nn.Module, config: WAVEConfig, *, whole_layers: bool = True
) -> tuple[dict[str, list[int]], dict[str, Tensor], dict[str, Tensor]]:
    """Templates and size tensors of a model.

    Args:
        whole_layers: start from as many whole layers as fit; False, or where none fits: the SVD alone.

    Returns:
        [N, w1, w2] by group, templates (N, w1, w2) by group, and the stacked size tensors by layout key.

    Raises:
        ValueError: no repeated blocks, no target matched, or templates that do not fit a group.
    """
    config = copy.copy(config)
    config.mode = "generate"
    groups = _target_groups(model, config)
    pattern = {group.key: list(config.size_of(group)) for group in groups}
    layout = layout_of(model, list(pattern))
    tensors = tensors_of(model)

    held = min(pattern[g.key][0] // _tiles_per_layer(g, pattern[g.key][1:]) for g in groups) if whole_layers else 0
    complete = all(pattern[g.key][0] == held * _tiles_per_layer(g, pattern[g.key][1:]) for g in groups)
    chosen = {name: wave.spread(min(held, depth), depth) for name, depth in layout.depths.items()}

    templates: dict[str, Tensor] = {}
    scalers: dict[str, Tensor] = {}
    for group in groups:
        count, *size = pattern[group.key]
        entries = {key: entry for key, entry in layout.entries.items() if entry.group == group.key}
        weights = [_matrices(entry, tensors) for entry in entries.values()]
        members = list(next(iter(entries.values())).names)
        layers = sorted({_position(members, layer) for layer in chosen[group.matrices[0].stack]})
        if layers and (complete or count < _full_rank(group, size)):
            coefficients, templates[group.key] = wave.repeat_layers(weights, layers, size, count)
        else:
            coefficients, templates[group.key] = wave.factorize(weights, size, count)
        scalers |= dict(zip(entries, coefficients, strict=True))

    own = stack(model, layout, scalers)
    if held and complete:  # the weights of a layer are those of another, so its biases and norms are
        own |= {key: _as_chosen(value, key, layout, chosen) for key, value in own.items() if key.startswith("layers.")}
    return pattern, templates, own


def _target_groups(model: nn.Module, config: WAVEConfig) -> list[blocks.Group]:
    """The targeted groups of matrices, each over all layers that have it, as `layout_of` will find them again."""
    if config.layers_to_transform is not None:
        raise ValueError(f"layers_to_transform={config.layers_to_transform}: a learngene is made of all layers.")
    matrices = blocks.find_matrices(model)
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        groups = blocks.group_matrices(matrices, config.share_qkv)
        config = copy.copy(config)
        config.target_modules = [m.name for g in groups if targets or g.num_layers > 1 for m in g.matrices]
    chosen = {matrix for matrix in matrices if check_target_module_exists(config, matrix.name)}
    if not chosen:
        raise ValueError(
            f"target_modules={targets!r} matches no matrix in the blocks of {type(model).__name__}, which have "
            f"{blocks.default_targets(model)}."
        )
    roles = {(matrix.stack, matrix.role) for matrix in chosen}
    groups = blocks.group_matrices([m for m in matrices if (m.stack, m.role) in roles], config.share_qkv)
    groups = [group for group in groups if not chosen.isdisjoint(group.matrices)]
    for group in groups:
        if left := [matrix.name for matrix in group.matrices if matrix not in chosen]:
            raise ValueError(f"target_modules leaves out {left[0]} of {group.key}: target all of its layers, or none.")
    if unknown := set(config.template_pattern or ()) - {group.key for group in groups}:
        raise ValueError(
            f"template_pattern names {sorted(unknown)}; the groups are {[group.key for group in groups]}."
        )
    return groups


def _tiles_per_layer(group: blocks.Group, template_size: list[int]) -> int:
    return sum(a * b for a, b in (wave.grid(shape, template_size) for shape in group.shapes))


def _full_rank(group: blocks.Group, template_size: list[int]) -> int:
    """As many templates as a group can use, from which on the SVD is exact."""
    return min(group.num_layers * _tiles_per_layer(group, template_size), template_size[0] * template_size[1])


def _matrices(entry: Entry, tensors: dict[str, Tensor]) -> Tensor:
    """The weights of one role, (L, m1, m2) in float32."""
    assert entry.module is not None  # every factored entry has its layer
    weights = torch.stack([tensors[name].detach() for name in entry.names.values()]).float()
    return blocks.weight_to_matrix(weights, entry.module)


def _position(members: list[int], layer: int) -> int:
    """Index in `members` (the layers that have a tensor) of the layer nearest to `layer`."""
    return members.index(wave.nearest(members, layer))


def _as_chosen(value: Tensor, key: str, layout: Layout, chosen: dict[str, list[int]]) -> Tensor:
    """A per-layer tensor (L, ...) with every layer replaced by the chosen layer nearest to it."""
    members = list(layout.entries[key].names)
    layers = chosen[layout.stack_of[key]]
    return value[[_position(members, wave.nearest(layers, layer)) for layer in members]]
