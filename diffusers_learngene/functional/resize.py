# SPDX-License-Identifier: Apache-2.0
"""How depth and width of one model map to those of another: which layer, which channel, which rescaling.

Depth. Layer l of L' takes the layer of L at the same relative depth, nearest and with both ends kept. Interpolating
two layers would average two trained functions into neither; selection keeps one of them. A residual block is a step of
an ODE whose number of steps changes, so the output of every residual branch is multiplied by L / L'.

Width. An axis of k D channels is k runs of D (adaLN's six modulations, the FFN's 4 D, the halves of a GEGLU), and each
run is cut (its first D' channels) or repeated cyclically. Cutting a run of whole heads drops heads. Summing over an
input axis, a channel that is there twice must count half, and one that is missing takes its variance with it:
columns are divided by their multiplicity when growing (the function is preserved exactly, as in Net2Net) and
multiplied by sqrt(n / n') when shrinking (fan-in).
"""

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor


DepthInit = Literal["nearest", "interpolated", "linear", "identical", "random"]


def relative_layers(source: int, target: int) -> list[int]:
    """Index of the source layer for each of `target` layers: nearest relative depth, first and last layer kept.

    >>> relative_layers(8, 4), relative_layers(4, 6)
    ([0, 2, 5, 7], [0, 1, 1, 2, 2, 3])
    """
    if target == 1:
        return [source - 1]
    return [math.floor(layer * (source - 1) / (target - 1) + 0.5) for layer in range(target)]


def resize_depth(tensor: Tensor, layers: int, how: DepthInit, generator: torch.Generator | None = None) -> Tensor:
    """Per-layer numbers for another depth, (L, ...) -> (layers, ...): the ablation of FINE (section 2.3).

    Args:
        tensor: scalers of a trained model, one a layer.
        layers: the other depth.
        how: "nearest" selects (`relative_layers`); "interpolated" mixes the two neighbours in relative depth; "linear"
            is the least-squares line through all layers, sampled; "identical" is their mean; "random" is normal with
            their root mean square, which is all that it keeps.
        generator: of "random"; default: torch's own.

    Raises:
        ValueError: an unknown `how`, or no layers.
    """
    if how not in get_args(DepthInit):
        raise ValueError(f"sigma_init={how!r} must be one of {', '.join(map(repr, get_args(DepthInit)))}.")
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1.")
    depth = len(tensor)
    if how == "nearest":
        return tensor[relative_layers(depth, layers)]
    if how == "identical":
        return tensor.mean(0, keepdim=True).expand(layers, *tensor.shape[1:]).clone()
    if how == "random":
        return torch.randn(layers, *tensor.shape[1:], generator=generator).to(tensor) * tensor.square().mean().sqrt()
    # The others are linear in the tensor: (layers, L) times (L, ...). A lone layer is the last, as when selecting.
    places = torch.linspace(0 if layers > 1 else depth - 1, depth - 1, layers, dtype=torch.float64)
    old = torch.arange(depth, dtype=torch.float64)
    if how == "interpolated":
        weight = (1 - (places[:, None] - old).abs()).clamp_min(0)
    else:
        line = torch.linalg.pinv(torch.stack([torch.ones_like(old), old], dim=1))  # (2, L)
        weight = torch.stack([torch.ones_like(places), places], dim=1) @ line
    return torch.tensordot(weight.to(tensor), tensor, dims=1)


def residual_gain(source: int, target: int, normed: bool = False) -> float:
    """Factor on the output of every residual branch when `source` layers become `target` layers: L / L'.

    Where the stream is `normed` after every sum (post-norm, as in BERT), it is min(1, L / L'): a branch that is scaled
    up in a shallower model drowns the stream, since the two terms of one sum are weighed against each other, and
    nothing else is. On the real all-MiniLM-L6-v2, 3 of 6 layers, untrained, have a mean cosine of 0.640 to the whole
    model's embeddings without a gain and 0.237 with L / L'; 11 layers 0.558 without and 0.779 with it
    (`examples/benchmark/encoder_depths.py`).
    """
    return min(1.0, source / target) if normed else source / target


def runs(axes: Iterable[tuple[int, int]], units: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """How many runs each changed axis (n, n') consists of.

    A run is as long as the largest unit that divides the axis and changes by the same ratio, and that unit's own runs
    come first. Units are the axes that some matrix sums over: the stream, D, and the FFN's inner width. (Not the
    narrower keys and values of grouped-query attention: each serves a group of the queries that has to stay whole.)

    >>> runs([(6, 12), (5, 10), (3, 6), (4, 8)], units=[(2, 4), (5, 10)])  # adaLN, FFN, keys, unknown; D = 2
    {(6, 12): 3, (5, 10): 1, (3, 6): 1, (4, 8): 2}
    """
    ordered = sorted({(n, m) for n, m in units if n != m})

    def count(n: int, m: int) -> int:
        parts = [(u, v) for u, v in ordered if u < n and n % u == 0 and v * (n // u) == m]
        return n // parts[-1][0] * count(*parts[-1]) if parts else 1

    return {(n, m): count(n, m) for n, m in axes if n != m}


def channel_map(source: int, target: int, runs: int = 1) -> Tensor:
    """Source channel of every target channel: each of `runs` runs is cut or repeated cyclically. Shape (target,)."""
    n, m = source // runs, target // runs
    return (torch.arange(runs)[:, None] * n + torch.arange(m)[None, :] % n).flatten()


def input_scale(source: int, target: int, runs: int = 1) -> Tensor:
    """Factor for every channel of an input axis, (target,): 1 / multiplicity when growing, sqrt(n / n') when cut."""
    if target <= source:
        return torch.full((target,), math.sqrt(source / target))
    index = channel_map(source, target, runs)
    return 1 / torch.bincount(index, minlength=source)[index]


def resize(
    tensor: Tensor, shape: tuple[int, ...], runs_of: dict[tuple[int, int], int], input_axis: int | None
) -> Tensor:
    """Map the trailing axes of `tensor` to `shape`; `input_axis` (counted within `shape`) is rescaled.

    Leading axes beyond `len(shape)` (layers) are kept.
    """
    lead = tensor.ndim - len(shape)
    for axis, target in enumerate(shape):
        source = tensor.shape[lead + axis]
        if source != target:
            count = runs_of.get((source, target), 1)
            tensor = tensor.index_select(lead + axis, channel_map(source, target, count).to(tensor.device))
            if axis == input_axis:
                scale = input_scale(source, target, count).to(tensor)
                tensor = tensor * scale.reshape(-1, *(1,) * (len(shape) - 1 - axis))
    return tensor
