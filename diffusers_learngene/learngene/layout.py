# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a model live, so that one set of tensors can become a model of any depth and width.

A `Layout` sorts the tensors of a model into three kinds. The layers of each kind are stacked along axis 0:

    scalers.<stack>.*.<role>    scalers of a factored matrix, (L, ...): with the bank of its group they make W
    layers.<stack>.*.<path>     every other tensor of a block (biases, norms, matrices that do not recur), (L, ...)
    lists.<list>.*.<path>       tensors of a list beside the blocks that may have one entry a block (the projections of
                                a ControlNet), stacked likewise
    shared.<name>               depth-agnostic tensors: embedders, position tables, the final layer

Going to another depth is then an index along axis 0 (`relative_layers`) and a gain on the residual outputs; a list
beside the blocks whose length changes follows them, and so does an axis that has numbers for every block. Going to
another width maps channels (`functional.resize`), of a factored matrix in the bank or in the scalers, as the method
has it. All of it is differentiable in the tensors, so that training can draw a size at random and train through it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, End, blocks
from ..functional import resize
from .methods import Bank, Method


@dataclass(frozen=True)
class Entry:
    """One stacked tensor: shape of a layer's slice, the tensor names it makes by layer, and how it is resized."""

    shape: tuple[int, ...]
    names: dict[int, str]
    group: str | None = None  # key of the bank that a factored matrix is made of
    offset: int = 0  # of a factored matrix: rows before it in the fused one of its group
    scaler: str | None = None  # of a factored matrix: key of its scalers, another entry's if the two share them
    input_axis: int | None = None  # axis that is summed over, rescaled when the width changes
    ends: dict[int, End] = field(default_factory=dict)  # by layer: it ends a residual branch there
    form: blocks.Form | None = None  # of a factored matrix: how its layer stores W

    def scaled(self, value: Tensor, gain: Callable[[End], float]) -> Tensor:
        """Values of this entry, (L, ...), where every residual branch that they end is multiplied by its gain."""
        if not self.ends:
            return value
        ends = [self.ends.get(layer) for layer in self.names]
        if ends[0] and all(end == ends[0] for end in ends):
            return ends[0].scaled(value, gain(ends[0]))
        return torch.stack([end.scaled(row, gain(end)) if end else row for end, row in zip(ends, value, strict=True)])


@dataclass(frozen=True)
class Layout:
    """Stacked tensors by key, the depth of every stack, and the method by which matrices are factored, if any are."""

    entries: dict[str, Entry]
    depths: dict[str, int]  # of stacks, and the lengths of lists beside them
    stack_of: dict[str, str] = field(default_factory=dict)
    method: Method | None = None

    def parts(self, group: str) -> list[Entry]:
        """The matrices that make up the fused one of a group, top to bottom."""
        return sorted((e for e in self.entries.values() if e.group == group), key=lambda entry: entry.offset)

    def groups_of(self, groups: Collection[str]) -> dict[str, str]:
        """Of the layers whose matrices belong to these groups, the group, by module path."""
        return {
            name.removesuffix(".weight"): entry.group
            for entry in self.entries.values()
            if entry.group and entry.group in groups
            for name in entry.names.values()
        }

    def owns(self, key: str) -> bool:
        """Whether an entry has a tensor of its own (k and v may share q's)."""
        return self.entries[key].scaler in (None, key)


def parse_group_key(key: str) -> tuple[str, list[str]]:
    """Stack and roles of a group key: "blocks.*.attn.to_q+to_k" -> ("blocks", ["attn.to_q", "attn.to_k"])."""
    stack, _, roles = key.partition("#")[0].rpartition(".*.")
    first, *others = roles.split("+")
    parent = first.rpartition(".")[0]
    return stack, [first, *(f"{parent}.{other}" if parent else other for other in others)]


def layout_of(anatomy: Anatomy, group_keys: Collection[str] = (), method: Method | None = None) -> Layout:
    """Sort the tensors of a model (meta tensors will do); the matrices of `group_keys` are factored by a method."""
    groups = _factored(anatomy, group_keys)
    ends = anatomy.ends

    entries: dict[str, Entry] = {}
    stack_of: dict[str, str] = {}
    for name, tensor in anatomy.tensors.items():
        module_path, _, attribute = name.rpartition(".")
        module = anatomy.model.get_submodule(module_path)
        place = next((_place(name, stack) for stack in anatomy.stacks if name.startswith(stack + ".")), None)
        input_axis = _input_axis(module) if attribute == "weight" else None
        beside = next((_place(name, path) for path in anatomy.lists if name.startswith(path + ".")), None)
        if beside:
            path, index, inside = beside
            key = _variant(f"lists.{path}.*.{inside}", (tuple(tensor.shape), None), entries)
            entries.setdefault(key, Entry(tuple(tensor.shape), {}, input_axis=input_axis)).names[index] = name
            stack_of[key] = path
            continue
        if place is None or id(tensor) in anatomy.shared_ids:
            entries[f"shared.{name}"] = Entry(tuple(tensor.shape), {0: name}, input_axis=input_axis)
            continue
        stack, layer, path = place
        if attribute == "weight" and module_path in groups:
            matrix, group, offset = groups[module_path]
            key = _variant(f"scalers.{stack}.*.{matrix.role}", (matrix.shape, group), entries)
            first = next((k for k, e in entries.items() if e.group == group), key)
            scaler = first if method and method.shares_scaler else key
            entry = Entry(matrix.shape, {}, group, offset, scaler, 1, form=blocks.form_of(module))
        else:
            key = _variant(f"layers.{stack}.*.{path}", (tuple(tensor.shape), None), entries)
            entry = Entry(tuple(tensor.shape), {}, input_axis=input_axis)
        entry = entries.setdefault(key, entry)
        entry.names[layer] = name
        if name in ends:
            entry.ends[layer] = ends[name]
        stack_of[key] = stack
    return Layout(entries, anatomy.depths | anatomy.lists, stack_of, method)


def _place(name: str, stack: str) -> tuple[str, int, str]:
    layer, _, path = name.removeprefix(stack + ".").partition(".")
    return stack, int(layer), path  # of a list of bare parameters, no path


def _variant(key: str, kind: tuple[tuple[int, ...], str | None], entries: Mapping[str, Entry]) -> str:
    """`key`, or "key#2", ... when that key is taken by tensors of another kind: another shape, or another group."""
    candidate, count = key, 1
    while candidate in entries and (entries[candidate].shape, entries[candidate].group) != kind:
        count += 1
        candidate = f"{key}#{count}"
    return candidate


def _factored(anatomy: Anatomy, group_keys: Collection[str]) -> dict[str, tuple[blocks.Matrix, str, int]]:
    """Matrix, group key and offset in its group, by module path, of the matrices that the groups name."""
    roles = {(stack, role) for key in group_keys for stack, names in [parse_group_key(key)] for role in names}
    chosen = [matrix for matrix in anatomy.matrices if (matrix.stack, matrix.role) in roles]
    share_qkv = any("+" in key for key in group_keys)
    return {
        matrix.name: (matrix, group.key, offset)
        for group in blocks.group_matrices(chosen, share_qkv)
        if group.key in group_keys
        for matrix, offset in zip(group.matrices, group.offsets, strict=True)
    }


def _input_axis(module: nn.Module) -> int | None:
    """The axis of a weight that is summed over: 1 for linear and convolution, 0 for Conv1D, none for tables, norms."""
    if isinstance(module, Conv1D):
        return 0
    return 1 if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def stack(
    tensors: Mapping[str, Tensor], layout: Layout, scalers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Collect the tensors of a model in stacked form; those of factored matrices are given as `scalers` by key."""
    stacked = dict(scalers or {})
    for key, entry in layout.entries.items():
        if key.startswith("shared."):
            stacked[key] = tensors[entry.names[0]].detach().float().clone()
        elif not entry.group:
            stacked[key] = torch.stack([tensors[name].detach().float() for name in entry.names.values()])
    return stacked


def unstack(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bank: Mapping[str, Bank] | None = None,
    origin: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The plain state of a model, name -> tensor, every factored matrix composed; differentiable in all arguments.

    Args:
        bank: by group, at the width of the layout; none where nothing is factored.
        origin: by name, what the factored matrices are added to; default: zero.
    """
    state = {}
    for key, entry in layout.entries.items():
        if key.startswith("shared."):
            state[entry.names[0]] = tensors[key]
            continue
        stacked = tensors[entry.scaler or key]
        if entry.group and entry.form and layout.method and bank:
            stacked = layout.method.compose(stacked, bank[entry.group], entry.shape, entry.offset)
            stacked = blocks.matrix_to_weight(stacked, entry.form)
            if origin:
                stacked = stacked + torch.stack([origin[name] for name in entry.names.values()])
        state.update(zip(entry.names.values(), stacked.unbind(), strict=True))
    return state


def resize_tensors(
    tensors: Mapping[str, Tensor],
    source: Layout,
    target: Layout,
    bank: Mapping[str, Bank] | None = None,
    how: resize.DepthInit = "nearest",
) -> dict[str, Tensor]:
    """Stacked tensors of one layout -> those of another depth and width (module docstring).

    Same width: an index and a gain per tensor. Another width: channels are mapped, and scalers as their method has it.

    Args:
        bank: by group, at the width of the source; none where nothing is factored.
        how: scalers of another depth are made (`resize.resize_depth`); all other tensors are selected.

    Raises:
        ValueError: the target has a tensor that the source lacks, or an axis changes that is not a width.
    """
    matches, by_block, resized = _width_map(source, target)
    result = {}
    for key, entry in target.entries.items():
        if not target.owns(key):
            continue
        origin = source.entries[matches[key]]
        value = tensors[matches[key]]
        if not key.startswith("shared."):
            if entry.group and how != "nearest":
                value = resize.resize_depth(value, len(entry.names), how)
            else:
                value = value[_layer_index(key, source, target, origin, entry)]
            depth = source.depths[target.stack_of[key]], target.depths[target.stack_of[key]]
            value = entry.scaled(value, partial(_gain, *depth))
        for axis, numbers in by_block.get(key, {}).items():
            value = value.index_select(value.ndim - len(origin.shape) + axis, numbers.to(value.device))
        if entry.group and source.method and bank:
            if origin.shape != entry.shape:
                value = source.method.resize_scaler(value, bank[entry.group], origin.shape, entry.shape, resized)
        elif value.shape[value.ndim - len(entry.shape) :] != entry.shape:
            value = resized(value, entry.shape, entry.input_axis)
        result[key] = value
    return result


def _gain(source: int, target: int, end: End) -> float:
    """Of a branch that ends so, when `source` layers become `target` layers."""
    return resize.residual_gain(source, target, end.normed)


def resize_bank(bank: Mapping[str, Bank], source: Layout, target: Layout) -> dict[str, Bank]:
    """The bank of every group at the width of another layout; differentiable.

    Raises:
        ValueError: as `resize_tensors`.
    """
    *_, resized = _width_map(source, target)
    result = {}
    for key, own in bank.items():
        shapes, targets = ([part.shape for part in layout.parts(key)] for layout in (source, target))
        if source.method and shapes != targets:
            own = source.method.resize_bank(own, shapes, targets, resized)
        result[key] = own
    return result


def _width_map(
    source: Layout, target: Layout
) -> tuple[dict[str, str], dict[str, dict[int, Tensor]], Callable[[Tensor, tuple[int, ...], int | None], Tensor]]:
    """Source key of every target key; of axes that hold numbers for every block, which of them to take, by key and
    axis; and how a tensor is brought to a shape of the target."""
    matches = match(source, target) or _match_variants(source, target)
    axes = {
        key: list(zip(source.entries[matches[key]].shape, entry.shape, strict=True))
        for key, entry in target.entries.items()
    }
    widths = {(n, m) for key, pairs in axes.items() if not key.startswith("shared.") for n, m in pairs if n != m}
    by_block: dict[str, dict[int, Tensor]] = {}
    for key, pairs in axes.items():
        for axis, (n, m) in enumerate(pairs):
            if n == m or any(n % u == 0 and m == v * (n // u) for u, v in widths):
                continue
            numbers = _numbers_of_blocks(source, target, n, m) if key.startswith("shared.") else None
            if numbers is None:
                raise ValueError(f"axis {axis} of {key!r} would go from {n} to {m}: only depth and width can change.")
            by_block.setdefault(key, {})[axis] = numbers
            pairs[axis] = m, m
    units = [axes[key][entry.input_axis] for key, entry in target.entries.items() if entry.input_axis is not None]
    runs = resize.runs({pair for pairs in axes.values() for pair in pairs}, units)
    return matches, by_block, lambda tensor, shape, input_axis: resize.resize(tensor, shape, runs, input_axis)


def _numbers_of_blocks(source: Layout, target: Layout, n: int, m: int) -> Tensor | None:
    """Of an axis n = k L of L blocks that becomes m = k L', the numbers of each block's source; None of another."""
    for name, new in target.depths.items():
        old = source.depths.get(name, new)
        if old != new and n % old == 0 and m == n // old * new:
            count = n // old
            return (torch.tensor(resize.relative_layers(old, new))[:, None] * count + torch.arange(count)).flatten()
    return None


def match(source: Layout, target: Layout) -> dict[str, str] | None:
    """Source key of every target key, of the same role and shape, but for axes that follow the depth; None unless all
    have one (another width)."""
    own = {(_role(key), entry.shape, entry.group): key for key, entry in reversed(source.entries.items())}
    found = {}
    for key, entry in target.entries.items():
        kind = _role(key), entry.shape, entry.group
        if kind in own:
            found[key] = own[kind]
        elif (
            key.startswith("shared.") and key in source.entries and len(source.entries[key].shape) == len(entry.shape)
        ):
            pairs = zip(source.entries[key].shape, entry.shape, strict=True)
            if not all(n == m or _numbers_of_blocks(source, target, n, m) is not None for n, m in pairs):
                return None
            found[key] = key
        else:
            return None
    return found


def _match_variants(source: Layout, target: Layout) -> dict[str, str]:
    """Source key of every target key, of the same role and, if it has several shapes, the same of them in order."""
    found = {}
    for key, entry in target.entries.items():
        others = [k for k, e in source.entries.items() if _role(k) == _role(key) and len(e.shape) == len(entry.shape)]
        if not others:
            raise ValueError(f"this learngene has no tensor for {key!r}: it was condensed from another architecture.")
        found[key] = key if key in others else others[0]
    return found


def _role(key: str) -> str:
    return key.partition("#")[0]


def _layer_index(key: str, source: Layout, target: Layout, origin: Entry, entry: Entry) -> list[int]:
    """Index along axis 0 of the source for every layer of the target: the layer at the same relative depth, or the
    nearest that has this tensor (the last block of SD3 lacks some)."""
    name = target.stack_of[key]
    layers = resize.relative_layers(source.depths[name], target.depths[name])
    members = list(origin.names)
    return [min(range(len(members)), key=lambda i: abs(members[i] - layers[layer])) for layer in entry.names]
