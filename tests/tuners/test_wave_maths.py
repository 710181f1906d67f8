# SPDX-License-Identifier: Apache-2.0
"""WAVE's pure functions against their definition, on random shapes that templates do and do not divide."""

import random

import pytest
import torch

from diffusers_learngene.functional import wave


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
# (m1, m2), (w1, w2), N: dividing, overhanging on either side, larger than the matrix, one number, one row
SIZES = [
    ((8, 12), (4, 3), 5),
    ((10, 7), (4, 3), 5),
    ((10, 12), (4, 3), 1),
    ((5, 7), (8, 9), 2),
    ((6, 6), (1, 1), 1),
    ((1, 9), (1, 4), 3),
]
RANDOM = random.Random(0)
SIZES += [
    (
        (RANDOM.randint(1, 20), RANDOM.randint(1, 20)),
        (RANDOM.randint(1, 8), RANDOM.randint(1, 8)),
        RANDOM.randint(1, 6),
    )
    for _ in range(12)
]


def draw(shape, size, num, *layers, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scaler = torch.randn(*layers, num, *wave.grid(shape, size), generator=generator, dtype=torch.float64)
    templates = torch.randn(num, *size, generator=generator, dtype=torch.float64)
    return scaler.to(dtype), templates.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "size", "num"), SIZES)
def test_compose_is_the_sum_of_kronecker_products(shape, size, num, dtype):
    scaler, templates = draw(shape, size, num, dtype=dtype)
    expected = sum(torch.kron(s, t) for s, t in zip(scaler.double(), templates.double(), strict=True))
    found = wave.compose(scaler, templates, shape=shape)
    assert found.dtype == dtype and found.shape == shape
    scale = expected.abs().max()
    assert (found.double() - expected[: shape[0], : shape[1]]).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "size", "num"), SIZES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_apply_is_the_product_with_compose(shape, size, num, lead, dtype):
    scaler, templates = draw(shape, size, num, dtype=dtype)
    x = torch.randn(*lead, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ wave.compose(scaler.double(), templates.double(), shape=shape).T
    found = wave.apply(x, scaler, templates, shape=shape)
    assert found.dtype == dtype and found.shape == (*lead, shape[0])
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max())


def test_compose_takes_leading_axes():
    scaler, templates = draw((10, 7), (4, 3), 5, 2, 3)
    found = wave.compose(scaler, templates, shape=(10, 7))
    assert found.shape == (2, 3, 10, 7)
    torch.testing.assert_close(found[1, 2], wave.compose(scaler[1, 2], templates, shape=(10, 7)))


def test_tleg_is_wave_with_two_templates():
    """theta_l = theta_B + l / L theta_A, one template as large as the matrix each, scalers 1 and l / L."""
    theta_a, theta_b = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).unbind()
    depths = torch.arange(1, 5) / 4
    scaler = torch.stack([torch.ones(4), depths], dim=1)[:, :, None, None]
    found = wave.compose(scaler, torch.stack([theta_b, theta_a]), shape=(6, 9))
    torch.testing.assert_close(found, theta_b + depths[:, None, None] * theta_a)


@pytest.mark.parametrize(
    ("size", "num"), [((4, 3), 1), ((4, 3), 7), ((2, 2), 1), ((2, 2), 3), ((8, 12), 1), ((8, 12), 7)]
)
def test_factorize_loses_the_discarded_singular_values(size, num):
    weights = [torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    rows = torch.cat([wave.tile(weight, size).flatten(0, -2) for weight in weights])
    scalers, templates = wave.factorize(weights, size, num)
    error = sum(
        (wave.compose(s, templates, shape=(8, 12)) - w).double().square().sum()
        for s, w in zip(scalers, weights, strict=True)
    )
    expected = torch.linalg.svdvals(rows.double())[num:].square().sum()
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-4)
    assert torch.cat([s.flatten() for s in scalers]).square().mean().sqrt() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 12), (10, 7), (3, 2)])
def test_factorize_at_full_rank_is_exact(shape):
    weights = [torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))]
    rank = min(5 * wave.grid(shape, (4, 3))[0] * wave.grid(shape, (4, 3))[1], 12)
    (scaler,), templates = wave.factorize(weights, (4, 3), rank)
    torch.testing.assert_close(wave.compose(scaler, templates, shape=shape), weights[0], rtol=1e-4, atol=1e-4)


def test_factorize_refuses_more_templates_than_rank():
    with pytest.raises(ValueError, match="num_templates=13"):
        wave.factorize([torch.randn(5, 8, 12)], (4, 3), 13)


@pytest.mark.parametrize(("shape", "size", "num"), [((8, 12), (4, 3), 5), ((10, 7), (4, 3), 3), ((3, 2), (4, 3), 2)])
def test_fit_scaler_finds_the_scaler_of_a_tiling(shape, size, num):
    scaler, templates = draw(shape, size, num, 2)
    weight = wave.compose(scaler, templates, shape=shape)
    found = wave.fit_scaler(weight, templates)
    assert found.shape == scaler.shape
    torch.testing.assert_close(wave.compose(found, templates, shape=shape), weight)


def test_fit_scaler_is_least_squares():
    weight, (_, templates) = torch.randn(8, 12, dtype=torch.float64), draw((8, 12), (4, 3), 3)
    residual = wave.compose(wave.fit_scaler(weight, templates), templates, shape=(8, 12)) - weight
    projections = wave.tile(residual, (4, 3)) @ templates.flatten(1).T
    assert projections.abs().max() < 1e-10


def test_random_init_gives_xaviers_variance():
    generator = torch.Generator().manual_seed(0)
    templates = wave.random_init([(64, 64), (64, 128)], 8, (32, 32), generator)
    scaler = torch.randn(50, 8, 2, 2, generator=generator)
    variance = wave.compose(scaler, templates, shape=(64, 64)).var()
    assert variance == pytest.approx(2 / ((128 + 192) / 2), rel=0.1)


def test_cheaper_changes_sides():
    """Few tokens: factored. Many: the weight is built once. A weight as large as a template: always built."""
    assert wave.apply_is_cheaper(1, (8, 64, 64), (1024, 1024))
    assert not wave.apply_is_cheaper(100_000, (64, 512, 512), (1024, 1024))
    assert not wave.apply_is_cheaper(1000, (1, 64, 64), (64, 64))
