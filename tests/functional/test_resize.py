# SPDX-License-Identifier: Apache-2.0
"""Depth and width as maps of layers and channels."""

import doctest
import math

import pytest
import torch

from diffusers_learngene.functional import resize
from diffusers_learngene.functional.resize import channel_map, input_scale, relative_layers, residual_gain, runs


SIZES = [(1, 1), (1, 5), (2, 3), (3, 2), (8, 4), (4, 8), (12, 6), (7, 30)]


def test_examples_in_the_docs():
    assert doctest.testmod(resize).failed == 0


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_layers_are_in_order_and_keep_both_ends(source, target):
    layers = relative_layers(source, target)
    assert len(layers) == target and layers == sorted(layers) and layers[-1] == source - 1
    assert target == 1 or layers[0] == 0
    if source > 1 and target > 1:  # nearest: no other layer is nearer in relative depth
        for at, layer in enumerate(layers):
            distances = [abs(at / (target - 1) - other / (source - 1)) for other in range(source)]
            assert distances[layer] <= min(distances) + 1e-12
    assert relative_layers(source, source) == list(range(source))


def test_gain_keeps_the_sum_of_the_branches():
    assert residual_gain(6, 4) * 4 == 6 and residual_gain(5, 5) == 1
    assert residual_gain(6, 4, normed=True) == 1 and residual_gain(4, 6, normed=True) == residual_gain(4, 6) == 4 / 6


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize(("n", "m"), [(4, 2), (4, 4), (4, 6), (4, 8), (4, 12), (1, 3)])
def test_channels_of_every_run_stay_in_it(n, m, count):
    index = channel_map(count * n, count * m, count).reshape(count, m)
    for run in range(count):
        assert index[run].tolist() == [run * n + i % n for i in range(m)]  # cut, or repeated cyclically


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(4, 8), (4, 6), (4, 12), (6, 16)])
def test_growing_preserves_the_product(n, m, count):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, count * n, generator=generator), torch.randn(5, count * n, generator=generator)
    index, scale = channel_map(count * n, count * m, count), input_scale(count * n, count * m, count)
    torch.testing.assert_close(x[:, index] @ (weight[:, index] * scale).T, x @ weight.T)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 2), (6, 4), (6, 6)])
def test_cutting_preserves_the_variance(n, m):
    assert input_scale(n, m).tolist() == pytest.approx([math.sqrt(n / m)] * m)


@pytest.mark.parametrize(
    ("axes", "units", "expected"),
    [
        pytest.param([4, 24, 16, 20], [4, 16, 20], {4: 1, 24: 6, 16: 4, 20: 5}, id="stream, adaLN, FFN, both at once"),
        pytest.param([4, 2, 6, 12], [4, 6], {4: 1, 2: 1, 6: 1, 12: 2}, id="grouped queries, FFN of 1.5 D, gated"),
        pytest.param([2, 16, 32], [16, 32], {2: 1, 16: 1, 32: 2}, id="a table of biases for each head"),
        pytest.param([16, 40, 80], [16, 40], {16: 1, 40: 1, 80: 2}, id="gated FFN of 2.5 D: halves, not runs of D"),
        pytest.param([7], [4], {7: 1}, id="no unit divides it"),
    ],
)
@pytest.mark.parametrize("factor", [3, 0.5])
def test_runs(axes, units, expected, factor):
    def pairs(sizes):
        return [(2 * n, int(2 * n * factor)) for n in sizes]

    unchanged = [(10, 10), (3, 3)]
    assert runs(pairs(axes) + unchanged, pairs(units) + unchanged) == {
        (2 * n, int(2 * n * factor)): count for n, count in expected.items()
    }


def test_units_of_another_ratio_are_no_units():
    assert runs([(12, 24)], [(4, 4), (6, 18), (3, 5)]) == {(12, 24): 1}


@pytest.mark.parametrize("lead", [(), (3,)])
def test_resize(lead):
    """An axis of outputs is cut or repeated, an axis of inputs also rescaled, and leading axes are layers."""
    weight = torch.arange(float(math.prod((*lead, 4, 2)))).reshape(*lead, 4, 2)
    run = {(4, 8): 2, (2, 4): 1}
    wide = resize.resize(weight, (8, 4), run, 1)
    torch.testing.assert_close(wide, weight[..., [0, 1, 0, 1, 2, 3, 2, 3], :][..., [0, 1, 0, 1]] / 2)
    table = resize.resize(weight, (8, 4), run, None)
    torch.testing.assert_close(table, wide * 2)
    assert resize.resize(weight, (4, 2), run, 1) is weight
    assert resize.resize(weight.to(torch.bfloat16), (8, 4), run, 1).dtype == torch.bfloat16


def test_resize_is_differentiable():
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize.resize(w, (4, 6), {(4, 6): 2}, 1), weight)
