# SPDX-License-Identifier: Apache-2.0
"""KIND's arithmetic against loops over samples and components."""

import pytest
import torch

from diffusers_learngene.functional import kind


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def draw(rank=7, m1=5, m2=6):
    return normal(rank, seed=1), normal(m1, rank, seed=2), normal(m2, rank, seed=3)


def test_gate_by_hand():
    """Learngenes, then a round of units for every turn."""
    units = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    expected = [[1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert kind.gate(units, 2, 6).tolist() == [[bool(bit) for bit in row] for row in expected]
    assert kind.gate(units[1], 0, 3).tolist() == [False, True, True]
    assert kind.gate(torch.tensor([0.25, 0.75]), 1, 4).tolist() == [1, 0.25, 0.75, 0.25, 0.75]


@pytest.mark.parametrize("middle", [(), (4,), (2, 3)], ids=str)
def test_apply_is_a_weight_for_every_sample(middle):
    """Of components summed one by one."""
    (sigma, u, v), x = draw(), normal(3, *middle, 6)
    gate = (normal(3, 7, seed=4) > 0).double()
    found = kind.apply(x, sigma, gate, u, v)
    for sample in range(3):
        weight = sum(gate[sample, i] * sigma[i] * torch.outer(u[:, i], v[:, i]) for i in range(7))
        assert_close(found[sample], x[sample] @ weight.T)
        assert_close(kind.compose(sigma, gate, u, v)[sample], weight)


def test_gradients_follow_the_gate():
    """Components that are closed for every sample get none."""
    factors = [factor.requires_grad_() for factor in draw()]
    gate = torch.tensor([[1.0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0]]).double()
    kind.apply(normal(2, 4, 6), factors[0], gate, *factors[1:]).square().sum().backward()
    opened = gate.any(0)
    for factor in factors:
        assert torch.equal(factor.grad.reshape(-1, 7).any(0), opened)


@pytest.mark.parametrize(("shape", "rank"), [((5, 8), 3), ((8, 5), 5), ((6, 6), 6), ((4, 3), 9)], ids=str)
def test_factorize(shape, rank):
    """The best approximation of every layer, in order; exact from the smaller side on, and able to learn beyond."""
    weights = normal(3, *shape)
    sigma, u, v = kind.factorize(weights, rank)
    assert (sigma.shape, u.shape, v.shape) == ((3, rank), (3, shape[0], rank), (3, shape[1], rank))
    assert sigma.diff(dim=-1).le(0).all()
    for layer in range(3):
        values = torch.linalg.svdvals(weights[layer])
        error = weights[layer] - kind.compose(sigma[layer], torch.ones(rank), u[layer], v[layer])
        assert_close(error.square().sum(), values[rank:].square().sum())
    spare = slice(min(shape), rank)
    assert not sigma[:, spare].any() and (u[..., spare].norm(dim=1) * v[..., spare].norm(dim=1) > 0.01).all()


def test_factorize_keeps_what_it_can():
    assert [x.dtype for x in kind.factorize(normal(2, 4, 4).bfloat16(), 6)] == [torch.float32] * 3
    sigma, u, v = kind.factorize(normal(4, 4), 6)  # one weight
    assert (sigma.shape, u.shape, v.shape) == ((6,), (4, 6), (4, 6))
    with pytest.raises(ValueError, match="rank=0 must be"):
        kind.factorize(normal(2, 4, 4), 0)


def test_default_sizes():
    """Half the side and a 64th of it, the side being the smaller one of what is fused."""
    assert kind.default_sizes([(1024, 1024)] * 3) == (512, 16)
    assert kind.default_sizes([(4096, 1024)]) == (512, 16)
    assert kind.default_sizes([(20, 28)]) == (10, 1)
    assert kind.default_sizes([(1, 8)]) == (0, 1)
