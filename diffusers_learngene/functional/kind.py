# SPDX-License-Identifier: Apache-2.0
"""KIND: weights in components, of which some belong to classes and are switched on per sample (Xie et al., ICML 2025).

    W^(l)(c)  =  U diag(sigma * g(c)) V^T  =  sum_i  g_i(c) sigma_i u_i v_i^T                 (KIND-2)
    y         =  ((x V) * (sigma * g(c))) U^T

The first components are learngenes, on for every class; the others are tailors, on for the classes that the gate
g(c) in {0, 1}^r assigns them to. Gradients follow the gate, so training diverts what is common to all classes into
the learngenes and what is particular into the tailors. Every layer has its own U, sigma and V: unlike in FINE, nothing
is shared, and the arithmetic of one layer is FINE's with sigma * g for sigma (`functional.fine`). As the gate lies
between the two factors, a batch of many classes needs no weights per sample.

Letters: W (m1, m2), U (m1, r), V (m2, r), sigma (r,), g (..., r), C classes, B samples. Where q, k and v of a layer
are fused, W is theirs one above the other: one sigma, one V and one gate for the three, and each has its rows of U.

What the paper leaves open, and the reading here: the null class of classifier-free guidance owns no tailors, so the
unconditional branch knows no class; ranks are free (the tailors of all classes may outnumber the sides of W, as one
sample never sees them together); and a gate may be soft, as in DivControl, where it is a convex sum of classes.

Tailors are laid out in rounds: one for each unit of the assignment (a class, a group of classes, a column of a gate
matrix), then again one for each, so that a gate over units repeats, and two sets of tailors side by side are one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fine


def default_sizes(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Learngenes, and tailors of one class, where the factors are the whole weight: side / 2 and side / 64.

    `shapes` are the matrices that one layer brings to the group, and the side is the smaller one of the fused matrix:
    D for every matrix of a DiT. D / 2 learngenes follow from the paper's FLOPs; how many tailors each of its classes
    has is not known.
    """
    side = fine.default_rank(shapes)
    return side // 2, max(1, side // 64)


def gate(units: Tensor, num_learngene: int, num_tailors: int) -> Tensor:
    """The gate g (..., r) of open units (..., n): ones for the learngenes, then the units over and over.

    Args:
        units: 0/1, or weights; the class's row of the gate matrix.
        num_tailors: a multiple of n.
    """
    tailors = units.repeat(*(1 for _ in units.shape[:-1]), num_tailors // units.shape[-1])
    return torch.cat([tailors.new_ones(*units.shape[:-1], num_learngene), tailors], dim=-1)


def spread(gated: Tensor, dims: int) -> Tensor:
    """(B, r) as (B, 1, ..., 1, r) of `dims` dimensions: the same for all tokens of a sample."""
    return gated.reshape(len(gated), *(1,) * (dims - 2), gated.shape[-1])


def compose(sigma: Tensor, gate: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Build W(c) (KIND-2) for every gate: sigma (r,), gate (..., r), u (m1, r), v (m2, r) -> (..., m1, m2)."""
    return fine.compose(sigma * gate, u, v)


def apply(x: Tensor, sigma: Tensor, gate: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """x W(c)^T, every sample with its own class: x (B, ..., m2), gate (B, r) -> (B, ..., m1).

    2 r (m1 + m2) FLOPs a token (`fine.flops`), whatever the gate lets through.
    """
    return fine.apply(x, spread(sigma * gate, x.dim()), u, v)


def factorize(weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors in closed form: the SVD of every layer, the best approximation at this rank.

    More components than a layer has singular values get random factors with sigma = 0: W stays exact, and sigma, whose
    gradient is <u v^T, dW>, can still learn. (With u or v zero instead, it could not.)

    Args:
        weights: (..., m1, m2); for a gate, learngenes take the first components, which are the largest.
        rank: r.

    Returns:
        sigma (..., r) descending, u (..., m1, r) and v (..., m2, r), of which columns have norm 1 (on average, where
        random).

    Raises:
        ValueError: no components.
    """
    fine.check_rank(rank)
    u, sigma, vh = fine.svd(fine.at_least_float32(weights))
    u, sigma, v = u[..., :rank], sigma[..., :rank], vh.mT[..., :rank]
    if spare := rank - sigma.shape[-1]:
        *layers, m1, m2 = weights.shape
        more = (torch.randn(*layers, side, spare, dtype=u.dtype, device=u.device) / side**0.5 for side in (m1, m2))
        u, v = (torch.cat(pair, dim=-1) for pair in zip((u, v), more, strict=True))
        sigma = torch.cat([sigma, sigma.new_zeros(*layers, spare)], dim=-1)
    return sigma, u, v
