# SPDX-License-Identifier: Apache-2.0
"""FINE: weights in factors that layers share, of which each scales the components (Xie et al., arXiv 2409.19289).

    W^(l)  =  U diag(sigma^(l)) V^T  =  sum_i  sigma_i^(l) u_i v_i^T                          (FINE-1)

A dictionary of r matrices of rank one, shared by all layers of a group (and by all depths), and r numbers a layer.
The factors are free: neither orthogonal nor ordered, and nothing bounds r by the sides of W. Over all layers, (FINE-1)
is the CP decomposition of a tensor (L, m1, m2); for one layer, it is a LoRA of rank r, exactly (`to_lora`).

Letters: W (m1, m2), U (m1, r), V (m2, r), sigma (r,), L layers, "..." are layers. Where q, k and v of a layer share a
group, W is theirs one above the other: one sigma and one V for the three, and each has its rows of U.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .wave import nearest


# How much slower a FLOP of the two matmuls is than one of building W and using it, forward and backward, where the two
# cost about the same: 0.98 to 1.06 on a CPU core. (1.2 to 3 for thin factors, which are ten times cheaper anyway.)
TWO_MATMULS_PENALTY = 1.1
# Cosine of two layers' weights from which on `factorize` also looks at mixtures of layers. Those of independent layers
# are near 0; at 0.5, the highest in a trained DiT (adaLN), the layers themselves were still the better choice.
_ALIKE = 0.5


def default_rank(shapes: Sequence[Sequence[int]]) -> int:
    """The smaller side of the group's fused matrix: D for every matrix of a DiT, where the paper's 5x storage holds.

    `shapes` are the matrices that one layer brings to the group (q, k and v bring three, of which the rows are
    stacked).
    """
    return min(sum(m1 for m1, _ in shapes), shapes[0][1])


def compose(sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Build W (FINE-1): sigma (..., r), u (m1, r), v (m2, r) -> (..., m1, m2).

    Costs 2 r m1 m2 FLOPs a matrix, i.e. as much as r tokens through the layer.
    """
    return (u * sigma[..., None, :]) @ v.T


def apply(x: Tensor, sigma: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias without building W: x (..., m2), sigma (r,), u (m1, r), v (m2, r), bias (m1,) -> (..., m1).

    2 r (m1 + m2) FLOPs a token, against 2 m1 m2 for the dense W.
    """
    return expand((x @ v) * sigma, u, bias)


def expand(hidden: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    """The second half of `apply`. The bias goes into the product: a pass over the outputs of its own costs a sixth."""
    return F.linear(hidden, u, None if bias is None else bias.to(hidden.dtype))


def apply_is_cheaper(tokens: int, rank: int, shape: Sequence[int]) -> bool:
    """Whether `apply` beats building W and multiplying with it, two matmuls being slower by TWO_MATMULS_PENALTY."""
    factored, built = flops(tokens, rank, shape)
    return TWO_MATMULS_PENALTY * factored < built


def flops(tokens: int, rank: int, shape: Sequence[int]) -> tuple[int, int]:
    """FLOPs of `apply`, and of `compose` and a matmul, in a forward pass; the backward pass takes twice either.

    apply:  2 tokens r (m1 + m2);  dense:  2 (tokens + r) m1 m2.
    """
    return 2 * tokens * rank * (shape[0] + shape[1]), 2 * (tokens + rank) * shape[0] * shape[1]


def random_factors(shape: Sequence[int], rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Factors u (m1, r) and v (m2, r) for a matrix of `shape` (m1, m2), with columns of norm 1 on average."""
    check_rank(rank)
    u, v = (torch.randn(side, rank, generator=generator) / math.sqrt(side) for side in shape)
    return u, v


def sigma_std(shape: Sequence[int], rank: int) -> float:
    """Standard deviation of sigma with which `random_factors` give Xavier's variance 2 / (m1 + m2)."""
    check_rank(rank)
    m1, m2 = shape
    return math.sqrt(2 * m1 * m2 / ((m1 + m2) * rank))


def factorize(weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shared factors in closed form: of the components of all layers' SVDs, the `rank` largest.

    Each component is one layer's own at first, and the squared error is the sum of the discarded squared singular
    values. Where layers resemble each other (copies, sums of a few matrices), it is the SVDs of their mixtures, along
    eigenvectors of the Gram matrix <W^(k), W^(l)>, if these keep more: copies then take one layer's worth, TLEG's two.

    Not the best approximation: alternating least squares goes on from here to an error that is a few per cent lower.
    But trained layers share next to nothing, so what this gains is more of their random initialisation: up to r = D it
    made the model worse, and distillation from it was no faster (examples/benchmark/fine_fit.py).

    Args:
        weights: (L, m1, m2).
        rank: r.

    Returns:
        sigma (L, r), u (m1, r) and v (m2, r), the largest component first; columns of u and v have norm 1.

    Raises:
        ValueError: no components, or more than all layers have.
    """
    check_rank(rank, weights.shape)
    weights = at_least_float32(weights)
    basis = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    owner, values, u, v = _largest(weights, rank)
    gram = weights.flatten(1) @ weights.flatten(1).T
    norms = gram.diagonal().sqrt()
    if (gram - gram.diagonal().diag()).abs().gt(_ALIKE * norms * norms[:, None]).any():
        mixing = torch.linalg.eigh(gram).eigenvectors  # (L, mixtures)
        mixtures = _largest(torch.tensordot(mixing.T, weights, dims=1), rank)
        if mixtures[1].norm() > values.norm():
            basis, (owner, values, u, v) = mixing, mixtures
    return basis[:, owner] * values, u, v


def _largest(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the SVDs of matrices (n, m1, m2), the largest components: which matrix (r,), value (r,), u, v."""
    owner, values = torch.empty(0, dtype=torch.long, device=matrices.device), matrices.new_empty(0)
    u, v = matrices.new_empty(matrices.shape[1], 0), matrices.new_empty(matrices.shape[2], 0)
    for index, matrix in enumerate(matrices):
        left, singular, right = svd(matrix)
        values, order = torch.cat([values, singular]).sort(descending=True, stable=True)
        order, values = order[:rank], values[:rank]
        owner = torch.cat([owner, owner.new_full(singular.shape, index)])[order]
        u, v = torch.cat([u, left], dim=1)[:, order], torch.cat([v, right.T], dim=1)[:, order]
    return owner, values, u, v


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced SVD of (..., m1, m2), of wide matrices by the transpose, which LAPACK is three times faster at."""
    if matrix.shape[-2] >= matrix.shape[-1]:
        return torch.linalg.svd(matrix, full_matrices=False)
    right, singular, left = torch.linalg.svd(matrix.mT, full_matrices=False)
    return left.mT, singular, right.mT


def at_least_float32(weights: Tensor) -> Tensor:
    """Weights in the precision that decompositions need, without their graph."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32))


def hold_layers(weights: Tensor, chosen: Sequence[int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Components that hold a few whole layers: their truncated SVDs, side by side, the rank split evenly.

    Every layer starts as the nearest of the `chosen` layers. Where these need fewer components than there are,
    `factorize` gives the others to what the other layers lack.

    Args:
        weights: (L, m1, m2).
        chosen: ascending indices of the layers to hold.
        rank: r.

    Returns:
        As `factorize`: sigma (L, r), u (m1, r) and v (m2, r), of which columns have norm 1.

    Raises:
        ValueError: fewer components than chosen layers, or more than all layers have.
    """
    check_rank(rank, weights.shape)
    if rank < len(chosen):
        raise ValueError(f"rank={rank} is too low to hold the {len(chosen)} layers {list(chosen)}.")
    weights = at_least_float32(weights)
    depth, m1, m2 = weights.shape
    sigma, u, v = weights.new_zeros(depth, rank), weights.new_zeros(m1, rank), weights.new_zeros(m2, rank)
    near, start = [nearest(chosen, layer) for layer in range(depth)], 0
    for i, layer in enumerate(chosen):
        share = min(rank * (i + 1) // len(chosen) - rank * i // len(chosen), m1, m2)
        left, values, right = svd(weights[layer])
        part = slice(start, start := start + share)
        u[:, part], v[:, part] = left[:, :share], right[:share].T
        sigma[[n == layer for n in near], part] = values[:share]
    if start < rank:  # the chosen layers are complete
        others = [layer for layer in range(depth) if layer not in chosen]
        rest = weights[others] - weights[[near[layer] for layer in others]]
        sigma[others, start:], u[:, start:], v[:, start:] = factorize(rest, rank - start)
    return sigma, u, v


def fit_sigma(weights: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Least-squares sigma (..., r) of given factors u (m1, r), v (m2, r) for weights (..., m1, m2).

    Exact wherever the weights are such a sum. Where components are dependent, the solution of least norm.
    """
    u64, v64 = u.double(), v.double()
    gram = (u64.T @ u64) * (v64.T @ v64)  # <u_i v_i^T, u_j v_j^T>
    flat = weights.reshape(-1, *weights.shape[-2:])
    rows = torch.stack([(u64 * (weight.double() @ v64)).sum(0) for weight in flat])
    sigma = rows @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    return sigma.reshape(*weights.shape[:-2], -1).to(u.dtype)


def to_lora(sigma: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, m2) and B (m1, r) of the LoRA that is this layer, exactly: B A = W; sigma (r,), u (m1, r), v (m2, r)."""
    return sigma[:, None] * v.T, u


def check_rank(rank: int, shape: Sequence[int] = ()) -> None:
    """Raise a ValueError unless a rank is positive and no more than weights of `shape` (L, m1, m2) have components."""
    most = shape[0] * min(shape[1:]) if shape else rank
    if rank < 1 or rank > most:
        limit = f"from 1 to {most}, the components of {shape[0]} {shape[1]} x {shape[2]} matrices" if shape else "> 0"
        raise ValueError(f"rank={rank} must be {limit}.")
