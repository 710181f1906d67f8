# SPDX-License-Identifier: Apache-2.0
"""An anatomy as text: what somebody who brings a model of their own asks first."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..functional import fine, wave
from .blocks import Group, group_matrices


if TYPE_CHECKING:
    from .anatomy import Anatomy


_HEADER = ("group", "layers", "shape", "dense", "WAVE", "FINE", "ends a branch")


def table(anatomy: "Anatomy") -> str:
    """Stacks and their groups, what each costs dense and as a bank, what ends each branch, what stays dense and why.

    WAVE and FINE are the numbers of a learngene of the default size, scalers of all layers included.
    """
    if not anatomy.stacks:
        return f"{type(anatomy.model).__name__}: no repeated blocks, nothing that layers could share."
    groups = group_matrices(anatomy.shareable)
    shared = [group for group in groups if group.num_layers > 1]
    ending = {name.rpartition(".")[0] for kind in anatomy.blocks for name in _absolute(kind.paths, kind.ends)}
    total = sum(tensor.numel() for tensor in anatomy.tensors.values())
    factored = sum(map(_dense, shared))
    lines = [
        f"{type(anatomy.model).__name__}: {total:,} numbers, {factored / max(1, total):.0%} of them in "
        f"{len(shared)} groups that layers can share"
    ]
    for stack, depth in anatomy.depths.items():
        kinds = {kind.cls.__name__ for kind in anatomy.blocks if kind.paths[0].startswith(f"{stack}.")}
        rows = [_row(group, stack, ending) for group in shared if group.matrices[0].stack == stack]
        lines += ["", f"{stack}: {depth} x {' / '.join(sorted(kinds))}", *_aligned([_HEADER, *rows])]
    lines += ["", *_left_dense(anatomy, groups, total - factored), *_warned(anatomy)]
    return "\n".join(lines)


def _absolute(paths: Sequence[str], names: Sequence[str] | dict[str, float]) -> list[str]:
    return [f"{path}.{name}" for path in paths for name in names]


def _dense(group: Group) -> int:
    return sum(matrix.shape[0] * matrix.shape[1] for matrix in group.matrices)


def _row(group: Group, stack: str, ending: set[str]) -> tuple[str, ...]:
    shapes, layers = group.shapes, group.num_layers
    size = wave.default_template_size(shapes)
    tiles = sum(a * b for a, b in (wave.grid(shape, size) for shape in shapes))
    templates = wave.default_num_templates(shapes, layers, size)
    rank = fine.default_rank(shapes)
    fused = sum(m1 for m1, _ in shapes), shapes[0][1]
    return (
        group.key.removeprefix(f"{stack}.*."),
        str(layers),
        " + ".join(dict.fromkeys(f"{shapes.count(shape)} x {shape[0]} x {shape[1]}" for shape in shapes)),
        f"{_dense(group):,}",
        f"{templates * (size[0] * size[1] + layers * tiles):,}",
        f"{rank * (sum(fused) + layers):,}",
        "yes" if any(matrix.name in ending for matrix in group.matrices) else "",
    )


def _left_dense(anatomy: "Anatomy", groups: Sequence[Group], numbers: int) -> list[str]:
    """What no bank makes, each with the reason."""
    once = [group.key for group in groups if group.num_layers == 1]
    uncalled = sorted({matrix.role for matrix in anatomy.matrices if matrix.name in anatomy.uncalled})
    lines = [f"dense: {numbers:,} numbers: embedders, norms, biases, whatever is in no block or shared by all"]
    if once:
        lines.append(f"  only one layer has them: {', '.join(once)}")
    if uncalled:
        lines.append(f"  read without being called: {', '.join(uncalled)}")
    others = sorted({name.rpartition(".")[2] for kind in anatomy.blocks for name in kind.ends})
    if others:
        ends = sorted({name for kind in anatomy.blocks for name in kind.ends})
        lines.append(f"residual branches end in: {', '.join(ends)}")
    return lines


def _warned(anatomy: "Anatomy") -> list[str]:
    lines = []
    for kind in anatomy.blocks:
        if kind.reason:
            lines.append(f"{kind.cls.__name__}: {kind.reason}; its residual branches are not known")
        elif kind.lost:
            lines.append(f"{kind.cls.__name__}: {kind.lost} residual branches end in nothing that scales them alone")
    return lines


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of words to the left, of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index in (0, 6) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
