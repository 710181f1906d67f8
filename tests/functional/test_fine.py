# SPDX-License-Identifier: Apache-2.0
"""FINE's pure functions against their definition, and what its closed forms keep and lose."""

import math
import random
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from diffusers_learngene.functional import fine, wave
from diffusers_learngene.functional.resize import DepthInit, resize_depth


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
# (m1, m2), r: below and above the sides, one number, one row
SIZES = [((8, 12), 5), ((12, 8), 8), ((5, 7), 20), ((1, 1), 1), ((1, 9), 3), ((9, 1), 3)]
RANDOM = random.Random(0)
SIZES += [((RANDOM.randint(1, 20), RANDOM.randint(1, 20)), RANDOM.randint(1, 30)) for _ in range(12)]
DIT_BLOCK = [[(1, 1)] * 3, [(1, 1)], [(4, 1)], [(1, 4)], [(6, 1)]]  # qkv, o, in, out, adaLN in units of D


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw(shape, rank, *layers, dtype=torch.float64):
    return (
        normal(*layers, rank, dtype=dtype),
        normal(shape[0], rank, seed=1, dtype=dtype),
        normal(shape[1], rank, seed=2, dtype=dtype),
    )


def error(weights, factors):
    """Relative error of a fit."""
    return ((fine.compose(*factors) - weights).norm() / weights.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "rank"), SIZES)
def test_compose_is_the_sum_of_its_components(shape, rank, dtype):
    sigma, u, v = draw(shape, rank, dtype=dtype)
    expected = sum(s * torch.outer(a, b) for s, a, b in zip(sigma.double(), u.double().T, v.double().T, strict=True))
    found = fine.compose(sigma, u, v)
    assert found.dtype == dtype and found.shape == shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max() * math.sqrt(rank)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "rank"), SIZES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_apply_is_the_product_with_compose(shape, rank, lead, dtype):
    sigma, u, v = draw(shape, rank, dtype=dtype)
    x = normal(*lead, shape[1], seed=3, dtype=dtype)
    expected = x.double() @ fine.compose(sigma.double(), u.double(), v.double()).T
    found = fine.apply(x, sigma, u, v)
    assert found.dtype == dtype and found.shape == (*lead, shape[0])
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max()) * math.sqrt(rank)


def test_compose_takes_leading_axes():
    sigma, u, v = draw((10, 7), 5, 2, 3)
    found = fine.compose(sigma, u, v)
    assert found.shape == (2, 3, 10, 7)
    assert_close(found[1, 2], fine.compose(sigma[1, 2], u, v))


def test_rows_of_the_fused_matrix_are_rows_of_u():
    sigma, u, v = draw((9, 4), 5, 2)
    for rows, part in zip(u.split([3, 4, 2]), fine.compose(sigma, u, v).split([3, 4, 2], dim=-2), strict=True):
        assert_close(fine.compose(sigma, rows, v), part)


def test_gradients():
    factors = [factor.requires_grad_() for factor in draw((4, 3), 5)]
    assert torch.autograd.gradcheck(fine.compose, factors)
    assert torch.autograd.gradcheck(fine.apply, (normal(2, 3, seed=3).requires_grad_(), *factors))


def test_sigma_of_zero_is_alive():
    """adaLN-Zero: the matrix starts at zero, and sigma's gradient takes it away from there."""
    _, u, v = draw((4, 3), 5)
    sigma = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = (fine.compose(sigma, u, v) - normal(4, 3, seed=3)).square().sum()
    assert torch.autograd.grad(loss, sigma)[0].abs().min() > 1e-6


def test_default_rank_and_the_papers_numbers():
    """U and V hold 23 D r numbers, 13.6 M at D = 768 and 24.1 M at D = 1024; a layer adds 5 r."""
    for width, millions in ((768, 13.6), (1024, 24.1)):
        shapes = [[(m1 * width, m2 * width) for m1, m2 in group] for group in DIT_BLOCK]
        ranks = [fine.default_rank(group) for group in shapes]
        assert ranks == [width] * 5 and sum(ranks) == 5 * width
        sides = [sum(m1 for m1, _ in group) + group[0][1] for group in shapes]
        numbers = sum(side * rank for side, rank in zip(sides, ranks, strict=True))
        assert numbers == 23 * width**2 and round(numbers / 1e6, 1) == millions


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
@pytest.mark.parametrize("rank", [32, 64, 128])
def test_random_factors_give_xaviers_variance(shape, rank):
    generator = torch.Generator().manual_seed(0)
    u, v = fine.random_factors(shape, rank, generator)
    assert u.shape == (shape[0], rank) and v.shape == (shape[1], rank)
    assert u.norm(dim=0).mean() == pytest.approx(1, rel=0.05) and v.norm(dim=0).mean() == pytest.approx(1, rel=0.05)
    sigma = torch.randn(50, rank, generator=generator) * fine.sigma_std(shape, rank)
    assert fine.compose(sigma, u, v).var() == pytest.approx(2 / sum(shape), rel=0.1)


def test_cheaper_changes_sides():
    """Few tokens or a low rank: factored. Many tokens at full rank: the weight is built once."""
    assert fine.apply_is_cheaper(1, 1024, (1024, 1024))
    assert fine.apply_is_cheaper(100_000, 64, (1024, 1024))
    assert not fine.apply_is_cheaper(100_000, 1024, (1024, 1024))
    assert fine.flops(10, 3, (4, 5)) == (2 * 10 * 3 * 9, 2 * 13 * 20)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_factorize_one_layer_is_the_truncated_svd(shape, rank):
    weights = normal(1, *shape)
    expected = torch.linalg.svdvals(weights[0])[rank:].norm() / weights.norm()
    assert error(weights, fine.factorize(weights, rank)) == pytest.approx(expected.item(), abs=1e-12)


def test_factorize_loses_the_discarded_singular_values():
    weights = normal(5, 8, 12) * torch.tensor([1.0, 3, 2, 0.1, 1])[:, None, None]
    values = torch.linalg.svdvals(weights).flatten().sort(descending=True).values
    errors = [error(weights, fine.factorize(weights, rank)) for rank in range(1, 41)]
    expected = [values[rank:].norm().item() / weights.norm().item() for rank in range(1, 41)]
    assert errors == pytest.approx(expected, abs=1e-12)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12


def test_factorize_has_balanced_ordered_nested_deterministic_factors():
    weights = normal(4, 8, 12)
    sigma, u, v = fine.factorize(weights, 20)
    assert_close(u.norm(dim=0), torch.ones(20).double())
    assert_close(v.norm(dim=0), torch.ones(20).double())
    sizes = sigma.norm(dim=0)
    assert (sizes.diff() <= 0).all()
    for found, again in zip(fine.factorize(weights, 20), (sigma, u, v), strict=True):
        assert torch.equal(found, again)
    for fewer, factor in zip(fine.factorize(weights, 6), (sigma, u, v), strict=True):
        assert torch.equal(fewer, factor[:, :6])


def test_copies_of_a_layer_take_one_layers_worth():
    weights = normal(1, 8, 12) * torch.tensor([1.0, 2, -1, 1])[:, None, None]
    assert error(weights, fine.factorize(weights, 8)) < 1e-12
    near = weights + 1e-3 * normal(4, 8, 12, seed=1)  # trained a little after the copying
    assert error(near, fine.factorize(near, 8)) < 2e-3


def test_tleg_takes_two_layers_worth():
    """theta_l = theta_B + l / L theta_A."""
    theta_a, theta_b = normal(2, 6, 9)
    weights = theta_b + (torch.arange(1, 8) / 7)[:, None, None] * theta_a
    assert error(weights, fine.factorize(weights, 12)) < 1e-12


def test_zero_components_stay_alive():
    """At sigma = 0 a component can still be learned, as long as its u and v are not zero, too."""
    weights = normal(1, 6, 2) @ normal(3, 2, 5, seed=1)  # rank 2 each
    sigma, u, v = fine.factorize(weights, 15)
    assert (sigma.norm(dim=0) < 1e-12).sum() == 9
    assert_close(u.norm(dim=0), torch.ones(15).double())
    assert_close(v.norm(dim=0), torch.ones(15).double())
    assert fine.factorize(torch.zeros(2, 3, 4), 3)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_closed_forms_work_in_float32_at_least(dtype):
    weights = normal(3, 6, 5, dtype=dtype).requires_grad_()
    for factors in (fine.factorize(weights, 4), fine.hold_layers(weights, [1], 4)):
        assert {factor.dtype for factor in factors} == {torch.promote_types(dtype, torch.float32)}
        assert not any(factor.requires_grad for factor in factors)


@pytest.mark.parametrize("function", [fine.factorize, lambda weights, rank: fine.hold_layers(weights, [0], rank)])
@pytest.mark.parametrize("rank", [0, -1, 16])
def test_ranks_that_mean_nothing(function, rank):
    with pytest.raises(ValueError, match=f"rank={rank} must be from 1 to 15"):
        function(torch.ones(3, 7, 5), rank)


def test_errors():
    with pytest.raises(ValueError, match="rank=0 must be > 0"):
        fine.random_factors((3, 4), 0)
    with pytest.raises(ValueError, match="rank=-2 must be > 0"):
        fine.sigma_std((3, 4), -2)
    with pytest.raises(ValueError, match=r"rank=1 .* 2 layers \[0, 2\]"):
        fine.hold_layers(torch.ones(3, 4, 4), [0, 2], 1)
    with pytest.raises(ValueError, match="'cubic' must be one of"):
        resize_depth(torch.ones(3, 4), 2, "cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers=0"):
        resize_depth(torch.ones(3, 4), 0, "linear")


def test_hold_one_layer_at_full_rank():
    weights = normal(4, 8, 6)
    found = fine.compose(*fine.hold_layers(weights, [2], 6))
    assert_close(found, weights[2].expand_as(weights))


@pytest.mark.parametrize("rank", [4, 7, 12])
def test_hold_layers_truncates_each_of_them(rank):
    """Every layer is the best approximation, of its share of the rank, of the chosen layer nearest to it."""
    weights, chosen = normal(6, 8, 6), wave.spread(2, 6)
    sigma, u, v = fine.hold_layers(weights, chosen, rank)
    found = fine.compose(sigma, u, v)
    for share, layer in zip((rank // 2, rank - rank // 2), chosen, strict=True):
        left, values, right = torch.linalg.svd(weights[layer], full_matrices=False)
        expected = left[:, :share] * values[:share] @ right[:share]
        users = [i for i in range(6) if wave.nearest(chosen, i) == layer]
        assert_close(found[users], expected.expand(len(users), -1, -1))


def test_what_held_layers_leave_over_goes_to_the_others():
    weights = normal(4, 8, 6)
    errors = []
    for rank in (12, 16, 20, 24):
        factors = fine.hold_layers(weights, [0, 3], rank)
        assert_close(fine.compose(*factors)[[0, 3]], weights[[0, 3]])
        errors.append(error(weights, factors))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12


@pytest.mark.parametrize(("shape", "rank"), [((8, 12), 5), ((6, 6), 6), ((5, 4), 15)])
def test_fit_sigma_is_exact_in_the_span(shape, rank):
    sigma, u, v = draw(shape, rank, 2, 3)
    assert_close(fine.fit_sigma(fine.compose(sigma, u, v), u, v), sigma)


def test_fit_sigma_is_least_squares():
    _, u, v = draw((8, 12), 20)
    weights = normal(3, 8, 12, seed=4)
    residual = weights - fine.compose(fine.fit_sigma(weights, u, v), u, v)
    assert torch.einsum("lxy,xr,yr->lr", residual, u, v).abs().max() < 1e-10


def test_fit_sigma_shares_between_equal_components():
    sigma, u, v = draw((8, 12), 3, 2)
    twice = fine.fit_sigma(fine.compose(sigma, u, v), u.repeat(1, 2), v.repeat(1, 2))
    assert_close(twice, sigma.repeat(1, 2) / 2)
    assert fine.fit_sigma(normal(8, 12), u.float(), v.float()).dtype == torch.float32


def test_fit_sigma_returns_the_sigma_of_factorize():
    weights = normal(4, 8, 12)
    sigma, u, v = fine.factorize(weights, 32)  # exact, so that least squares has nothing to add
    assert error(weights, (fine.fit_sigma(weights, u, v), u, v)) < 1e-10


@pytest.mark.parametrize("trailing", [(5,), (2, 3, 4), ()])
@pytest.mark.parametrize("how", get_args(DepthInit))
def test_resize_depth_takes_any_scaler(trailing, how):
    sigma = normal(4, *trailing)
    for layers in (1, 2, 4, 7):
        found = resize_depth(sigma, layers, how, torch.Generator().manual_seed(0))
        assert found.shape == (layers, *trailing) and found.dtype == sigma.dtype and found.isfinite().all()
    assert resize_depth(sigma[:1], 3, how).shape == (3, *trailing)


@pytest.mark.parametrize("how", ["nearest", "interpolated"])
def test_resize_depth_of_the_same_depth_is_the_identity(how):
    sigma = normal(5, 3)
    assert torch.equal(resize_depth(sigma, 5, how), sigma)
    for layers in (2, 3, 9):  # both ends are kept
        assert_close(resize_depth(sigma, layers, how)[[0, -1]], sigma[[0, -1]])
    assert torch.equal(resize_depth(sigma, 1, how), sigma[-1:])


def test_interpolated_lies_between_neighbours():
    sigma = torch.tensor([[0.0], [2.0], [10.0]])
    assert_close(resize_depth(sigma, 5, "interpolated").flatten(), torch.tensor([0.0, 1, 2, 6, 10]))


@pytest.mark.parametrize("layers", [1, 3, 5, 12])
def test_linear_is_exact_on_lines_and_a_fit_otherwise(layers):
    places = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    slope, start = normal(2, 3)
    targets = torch.linspace(0, 1, layers, dtype=torch.float64)[:, None] if layers > 1 else torch.ones(1, 1).double()
    found = resize_depth(start + slope * places, layers, "linear")
    assert_close(found, start + slope * targets, rtol=1e-6, atol=1e-6)
    noise = normal(5, 3, seed=1)
    left = noise - resize_depth(noise, 5, "linear")
    assert left.sum(0).abs().max() < 1e-6 and (places * left).sum(0).abs().max() < 1e-6
    assert_close(resize_depth(noise[:1], layers, "linear"), noise[:1].expand(layers, -1), rtol=1e-6, atol=1e-6)


def test_identical_is_the_mean_and_random_keeps_the_size():
    sigma = 3 + normal(6, 500)
    identical = resize_depth(sigma, 4, "identical")
    assert_close(identical, sigma.mean(0).expand(4, -1))
    identical[0] = 0  # tensors of its own, not views of one
    assert identical[1].abs().min() > 0
    drawn = resize_depth(sigma, 8, "random", torch.Generator().manual_seed(0))
    assert drawn.square().mean().sqrt() == pytest.approx(sigma.square().mean().sqrt().item(), rel=0.05)
    assert drawn.mean().abs() < 0.2
    assert torch.equal(drawn, resize_depth(sigma, 8, "random", torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("shape", "rank"), SIZES)
def test_lora_is_exact(shape, rank):
    sigma, u, v = draw(shape, rank)
    a, b = fine.to_lora(sigma, u, v)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    assert_close(b @ a, fine.compose(sigma, u, v))
