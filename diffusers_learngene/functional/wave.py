# SPDX-License-Identifier: Apache-2.0
"""WAVE: weights as tiles of a few shared templates (Feng et al., CVPR 2025, arXiv 2406.17503).

    W^(l)  =  sum_t  kron(S^(l,t), T^(t))                                                     (WAVE-1)

Block (i, j) of W is the weighted sum  sum_t S[t, i, j] T[t]:  templates T are *tiled and weighted*. The templates are
shared by all layers of a group (and by all target sizes); the scalers S are a few numbers a layer.

The paper prints T (x) S. Read literally that interleaves channels and would cut attention heads apart; "concatenating
and weighting templates" is kron(S, T), which keeps a head whole as long as the template side is a multiple of the head
dimension. A matrix that the template does not divide is covered by ceil(m1 / w1) x ceil(m2 / w2) tiles and cropped.

Letters: W (m1, m2), template (w1, w2), N templates, grid a = ceil(m1 / w1), b = ceil(m2 / w2); "..." are layers.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


# How much slower a FLOP of two thin matmuls is than one of a fat one, forward and backward: 2 to 2.7 on two CPU cores
# (examples/benchmark/speed.py --sections penalty). Rounded up: `apply` keeps N times its input for the backward pass.
THIN_MATMUL_PENALTY = 3
_CHUNK = 1 << 12  # rows or columns of tiles that are in float64 at a time


def grid(shape: Sequence[int], template_size: Sequence[int]) -> tuple[int, int]:
    """Number of tiles (a, b) that cover a matrix of `shape` (m1, m2) with templates of `template_size` (w1, w2)."""
    return -(-shape[0] // template_size[0]), -(-shape[1] // template_size[1])


def default_template_size(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Half the smallest side of the group's matrices, in whole heads of 64 where there are any.

    The paper does not print its sizes. Its scalers are "only a few thousand", which asks for templates near D / 2, and
    descendants of other widths need a side that their widths are multiples of (note on WAVE, ambiguity 2).
    """
    side = max(1, min(min(shape) for shape in shapes) // 2)
    side = side // 64 * 64 if side >= 64 else side
    return side, side


def default_num_templates(shapes: Sequence[Sequence[int]], num_layers: int, template_size: Sequence[int]) -> int:
    """Two layers' worth of parameters, but never more templates than there are tiles, or numbers in a tile.

    Two layers' worth is what the paper's storage claim (about 5x for 12 layers) works out to, and what TLEG holds.
    `shapes` are the matrices that one layer brings to the group (q, k and v bring three).
    """
    numbers = template_size[0] * template_size[1]
    budget = round(2 * sum(m1 * m2 for m1, m2 in shapes) / numbers)
    tiles = num_layers * sum(a * b for a, b in (grid(shape, template_size) for shape in shapes))
    return max(1, min(budget, tiles, numbers))


def compose(scaler: Tensor, templates: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Build W (WAVE-1): scaler (..., N, a, b), templates (N, w1, w2) -> (..., m1, m2).

    Costs 2 N m1 m2 FLOPs a matrix, i.e. as much as N tokens through the layer.
    """
    w1, w2 = templates.shape[1:]
    a, b = scaler.shape[-2:]
    weight = torch.einsum("...tab,txy->...axby", scaler, templates)  # (..., a, w1, b, w2)
    return weight.reshape(*scaler.shape[:-3], a * w1, b * w2)[..., : shape[0], : shape[1]]


def apply(x: Tensor, scaler: Tensor, templates: Tensor, bias: Tensor | None = None, *, shape: Sequence[int]) -> Tensor:
    """x W^T + bias without building W: x (..., m2), scaler (N, a, b), templates (N, w1, w2) -> (..., m1).

    The cheaper of two orders, per token 2 N w1 (m2 + a b) or 2 N w2 (m1 + a b) FLOPs, against 2 m1 m2 for the dense W.
    """
    w1, w2 = templates.shape[1:]
    num, a, b = scaler.shape
    tiles = _pad(x, 0, b * w2 - shape[1]).reshape(-1, b, w2)  # (tokens, b, w2)
    # Batched over tokens, whose tiles stay where they are: a fold into one matmul has to transpose all tokens twice.
    if w1 * (shape[1] + a * b) <= w2 * (shape[0] + a * b):  # templates first
        hidden = tiles.reshape(-1, w2) @ templates.permute(2, 0, 1).reshape(w2, num * w1)
        mix = scaler.permute(1, 2, 0).reshape(a, b * num)
        y = torch.bmm(mix.expand(tiles.shape[0], -1, -1), hidden.reshape(-1, b * num, w1))  # (tokens, a, w1)
    else:  # scalers first
        mix = scaler.permute(1, 0, 2).reshape(a * num, b)
        hidden = torch.bmm(mix.expand(tiles.shape[0], -1, -1), tiles)  # (tokens, a N, w2)
        y = hidden.reshape(-1, num * w2) @ templates.permute(0, 2, 1).reshape(num * w2, w1)
    y = y.reshape(*x.shape[:-1], a * w1)[..., : shape[0]]
    return y if bias is None else y + bias


def apply_is_cheaper(tokens: int, templates_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether `apply` beats building W and multiplying with it, thin matmuls being slower by THIN_MATMUL_PENALTY."""
    factored, built = flops(tokens, templates_shape, shape)
    return THIN_MATMUL_PENALTY * factored < built


def flops(tokens: int, templates_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """FLOPs of `apply`, and of `compose` and a matmul, in a forward pass; the backward pass takes twice either.

    apply:  2 tokens N min(w1 (m2 + a b), w2 (m1 + a b));  dense:  2 (tokens + N) m1 m2.
    """
    num, w1, w2 = templates_shape
    a, b = grid(shape, (w1, w2))
    per_token = num * min(w1 * (shape[1] + a * b), w2 * (shape[0] + a * b))
    return 2 * tokens * per_token, 2 * (tokens + num) * shape[0] * shape[1]


def random_init(
    shapes: Sequence[Sequence[int]],
    num_templates: int,
    template_size: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Templates (N, w1, w2) for which unit-variance scalers give Xavier's variance 2 / (m1 + m2) on average."""
    fans = sum(m1 + m2 for m1, m2 in shapes) / len(shapes)
    return torch.randn(num_templates, *template_size, generator=generator) * math.sqrt(2 / (fans * num_templates))


def tile(weight: Tensor, template_size: Sequence[int]) -> Tensor:
    """Van Loan's rearrangement: W (..., m1, m2) -> tiles as rows (..., a b, w1 w2), zeros where they overhang."""
    return _tiles(weight, template_size).flatten(-2).flatten(-3, -2)


def _tiles(weight: Tensor, template_size: Sequence[int]) -> Tensor:
    """`tile` as (..., a, b, w1, w2), where nothing overhangs without a copy."""
    (w1, w2), (m1, m2) = template_size, weight.shape[-2:]
    a, b = grid((m1, m2), template_size)
    weight = _pad(weight, a * w1 - m1, b * w2 - m2)
    return weight.reshape(*weight.shape[:-2], a, w1, b, w2).transpose(-3, -2)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (..., m1, m2) with zeros below and on the right; x itself if there are none to add (F.pad would copy)."""
    return F.pad(x, (0, columns, 0, rows) if rows else (0, columns)) if rows or columns else x


def factorize(
    weights: Sequence[Tensor], template_size: Sequence[int], num_templates: int
) -> tuple[list[Tensor], Tensor]:
    """The best `num_templates` templates and scalers in the least-squares sense, in closed form.

    A sum of N Kronecker products is a rank-N matrix after Van Loan's rearrangement, so the truncated SVD of the tiles
    of all layers is optimal: the squared error is the sum of the discarded squared singular values. (Where templates
    overhang a matrix, optimal for the zero-padded one.) The SVD is taken from the Gram matrix of the smaller side in
    float64: one pass over the weights.

    Args:
        weights: tensors (..., m1, m2), e.g. the q, k and v weights of all layers, (L, D, D) each.
        template_size: (w1, w2).
        num_templates: N, at most the number of tiles and the numbers in one tile.

    Returns:
        One scaler (..., N, a, b) per tensor, of root mean square 1 over the group, and the templates (N, w1, w2).

    Raises:
        ValueError: N exceeds the rank that tiles of these matrices can have.
    """
    counts = [weight.shape[:-2].numel() * math.prod(grid(weight.shape[-2:], template_size)) for weight in weights]
    rows = torch.empty(sum(counts), math.prod(template_size), dtype=torch.float32, device=weights[0].device)
    for part, weight in zip(rows.split(counts), weights, strict=True):
        tiles = _tiles(weight.detach(), template_size)
        part.view(tiles.shape).copy_(tiles)
    if num_templates > min(rows.shape):
        raise ValueError(
            f"num_templates={num_templates} is more than the {min(rows.shape)} that {rows.shape[0]} tiles of "
            f"{template_size[0]} x {template_size[1]} can use: lower num_templates or template_size."
        )
    unit = math.sqrt(rows.shape[0])
    if rows.shape[0] <= rows.shape[1]:
        gram = sum(chunk @ chunk.T for chunk in (part.double() for part in rows.split(_CHUNK, dim=1)))
        left = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :num_templates]
        left = left.float()
        scalers, templates = left * unit, left.T @ rows / unit
    else:
        gram = sum(chunk.T @ chunk for chunk in (part.double() for part in rows.split(_CHUNK, dim=0)))
        values, vectors = torch.linalg.eigh(gram)
        right = vectors.flip(-1)[:, :num_templates]
        norms = (values.flip(-1)[:num_templates].clamp_min(0).sqrt() / unit).float()
        scalers = rows @ right.float() / norms.clamp_min(torch.finfo(torch.float32).tiny)
        templates = right.float().T * norms[:, None]
    split = zip(scalers.split(counts), weights, strict=True)
    return (
        [_untile_scaler(part, weight.shape, template_size) for part, weight in split],
        templates.reshape(num_templates, *template_size),
    )


def repeat_layers(
    weights: Sequence[Tensor], chosen: Sequence[int], template_size: Sequence[int], num_templates: int
) -> tuple[list[Tensor], Tensor]:
    """Templates that hold a few whole layers, tile by tile; what they leave over is given to `factorize`.

    Every layer starts as the nearest of the `chosen` layers, plus the best approximation of its difference from it by
    the remaining templates, if there are any. Far from optimal in the weights, but each layer is one that works.

    Args:
        weights: tensors (L, m1, m2), L >= 1, of the group.
        chosen: ascending indices of the layers to hold; num_templates must be enough for their tiles.
        template_size: (w1, w2).
        num_templates: N.

    Returns:
        As `factorize`: one scaler (L, N, a, b) per tensor, and the templates (N, w1, w2).
    """
    counts = [math.prod(grid(weight.shape[1:], template_size)) for weight in weights]
    held = len(chosen) * sum(counts)
    templates = weights[0].new_zeros(num_templates, *template_size, dtype=torch.float32)
    scalers, start = [], 0
    for weight, count in zip(weights, counts, strict=True):
        a, b = grid(weight.shape[1:], template_size)
        scaler = torch.zeros(len(weight), num_templates, a, b)
        for layer in chosen:
            templates[start : start + count] = tile(weight[layer].float(), template_size).unflatten(1, template_size)
            users = [i for i in range(len(weight)) if nearest(chosen, i) == layer]
            scaler[users, start : start + count] = torch.eye(count).reshape(count, a, b)
            start += count
        scalers.append(scaler)
    if num_templates > held:
        index = [[nearest(chosen, i) for i in range(len(weight))] for weight in weights]
        rest = [weight.float() - weight[near].float() for weight, near in zip(weights, index, strict=True)]
        rest_scalers, templates[held:] = factorize(rest, template_size, num_templates - held)
        for scaler, rest_scaler in zip(scalers, rest_scalers, strict=True):
            scaler[:, held:] = rest_scaler
    return scalers, templates


def spread(count: int, length: int) -> list[int]:
    """`count` indices out of `length`, each in the middle of its share, ties outwards: spread(2, 8) == [1, 6]."""
    middles = [(i + 0.5) / count * length - 0.5 for i in range(count)]
    return [math.floor(m) if m < (length - 1) / 2 else math.ceil(m) for m in middles]


def nearest(chosen: Sequence[int], index: int) -> int:
    """The member of `chosen` nearest to an index, the lower one of two."""
    return min(chosen, key=lambda member: abs(member - index))


def _untile_scaler(rows: Tensor, shape: Sequence[int], template_size: Sequence[int]) -> Tensor:
    """Rows (layers a b, N) of `factorize` -> the scaler (..., N, a, b) of a tensor of `shape` (..., m1, m2)."""
    a, b = grid(shape[-2:], template_size)
    return rows.reshape(*shape[:-2], a, b, -1).movedim(-1, -3).contiguous()


def fit_scaler(weight: Tensor, templates: Tensor) -> Tensor:
    """Least-squares scaler (..., N, a, b) of given templates (N, w1, w2) for a weight (..., m1, m2), tile by tile.

    Tiles that overhang the matrix are fitted on the part inside it. Exact wherever the weight is a tiling of the
    templates, as it is after selecting or repeating whole tiles.
    """
    w1, w2 = templates.shape[1:]
    m1, m2 = weight.shape[-2:]
    a, b = grid((m1, m2), (w1, w2))
    scaler = templates.new_empty(*weight.shape[:-2], len(templates), a, b)
    for rows, height in _bands(m1, w1):
        for columns, width in _bands(m2, w2):
            basis = templates[:, :height, :width].flatten(1).double()  # (N, height width)
            block = weight[..., rows.start * w1 :, columns.start * w2 :]
            block = block[..., : len(rows) * height, : len(columns) * width].double()
            tiles = tile(block, (height, width))  # (..., tiles, height width)
            solution = tiles @ torch.linalg.pinv(basis, rtol=1e-6)  # (..., tiles, N)
            fitted = solution.reshape(*weight.shape[:-2], len(rows), len(columns), -1).movedim(-1, -3)
            scaler[..., rows.start : rows.stop, columns.start : columns.stop] = fitted.to(scaler.dtype)
    return scaler


def _bands(length: int, side: int) -> list[tuple[range, int]]:
    """Tiles along an axis as (tile indices, side inside the matrix): the whole ones, then the cropped one if any."""
    whole, rest = divmod(length, side)
    return [band for band in ((range(whole), side), (range(whole, whole + 1), rest)) if len(band[0]) and band[1]]
