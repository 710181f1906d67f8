# SPDX-License-Identifier: Apache-2.0
"""An anatomy as text: what somebody who brings a model of their own asks first."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ..functional import fine, wave
from .blocks import Group, Matrix, group_matrices
from .kinds import BlockKind


_HEADER = ("group", "layers", "shape", "dense", "WAVE", "FINE", "ends a branch")


def table(
    name: str,
    tensors: Mapping[str, Tensor],
    depths: Mapping[str, int],
    matrices: Sequence[Matrix],
    uncalled: Collection[str],
    blocks: Sequence[BlockKind],
    experts: int = 0,
) -> str:
    """Stacks and their groups, what each costs dense and as a bank, what ends each branch, what stays dense and why.

    WAVE and FINE are the numbers of a learngene of the default size, scalers of all layers included. The arguments are
    the parts of `anatomy.Anatomy` of these names; `experts` is how many numbers those have.
    """
    groups = group_matrices([matrix for matrix in matrices if matrix.name not in uncalled])
    shared = [group for group in groups if group.num_layers > 1]
    ending = {f"{path}.{end.rpartition('.')[0]}" for kind in blocks for path in kind.paths for end in kind.ends}
    total, factored = sum(tensor.numel() for tensor in tensors.values()), sum(map(_dense, shared))
    part = f"{factored / max(1, total):.0%} of them in {len(shared)} groups"
    lines = [f"{name}: {total:,} numbers, {part} that layers can share"]
    for stack, depth in depths.items():
        classes = sorted({kind.cls.__name__ for kind in blocks if kind.paths[0].startswith(f"{stack}.")})
        rows = [_row(group, stack, ending) for group in shared if group.matrices[0].stack == stack]
        lines += ["", f"{stack}: {depth} x {' / '.join(classes)}", *_aligned([_HEADER, *rows])]
    lines += [
        "",
        f"dense: {total - factored:,} numbers: embedders, norms, biases, what is in no block or in all",
    ]
    if experts:
        lines.append(f"  {experts:,} of them in fused experts, tensors of three axes")
    if once := [group.key for group in groups if group.num_layers == 1]:
        lines.append(f"  only one layer has them: {', '.join(once)}")
    if unread := sorted({matrix.role for matrix in matrices if matrix.name in uncalled}):
        lines.append(f"  read without being called: {', '.join(unread)}")
    return "\n".join([*lines, *map(_ends, blocks)])


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
        " + ".join(dict.fromkeys(_times(shapes.count(shape), shape) for shape in shapes)),
        f"{_dense(group):,}",
        f"{templates * (size[0] * size[1] + layers * tiles):,}",
        f"{rank * (sum(fused) + layers):,}",
        "yes" if any(matrix.name in ending for matrix in group.matrices) else "",
    )


def _times(count: int, shape: tuple[int, int]) -> str:
    return f"{f'{count} x ' if count > 1 else ''}{shape[0]} x {shape[1]}"


def _ends(kind: BlockKind) -> str:
    """What ends the residual branches of a kind of block, tensors by module."""
    modules: dict[str, list[str]] = {}
    for name in kind.ends:
        path, _, attribute = name.rpartition(".")
        modules.setdefault(path, []).append(attribute)
    found = ", ".join(f"{path} ({', '.join(sorted(own))})" for path, own in modules.items())
    lost = f"; {kind.lost} end in nothing that scales them alone" if kind.lost else ""
    found = found or kind.reason or "nothing"
    return f"{kind.cls.__name__}, {len(kind.paths)} x: residual branches end in {found}{lost}"


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
