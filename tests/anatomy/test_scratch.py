# SPDX-License-Identifier: Apache-2.0
"""Random initialisation of another size."""

import pytest
import torch

from ancestries import ARCHITECTURES, ancestry, depth, stock, width
from diffusers_learngene.anatomy.scratch import scratch
from models import run


def same(first, second):
    return all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes(name):
    tiny = ancestry(name)
    overrides = {**depth(name, 2), **width(name, 2)}
    model = scratch(tiny.model, overrides)
    shapes = {key: value.shape for key, value in stock(tiny.model, **overrides).state_dict().items()}
    assert type(model) is type(tiny.model)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert run(model.eval(), tiny.inputs).isfinite().all()


@pytest.mark.parametrize("name", ["dit", "sd3", "vit"])
def test_seeds(name):
    model = ancestry(name).model
    before = torch.get_rng_state()
    first, again, other = (scratch(model, {}, seed=seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are used up


def test_a_dit_starts_as_in_its_paper():
    model = scratch(ancestry("dit").model, {"num_layers": 2})
    assert not model.proj_out_2.weight.any() and not model.transformer_blocks[1].norm1.linear.weight.any()
    assert model.transformer_blocks[0].norm1.emb is model.transformer_blocks[1].norm1.emb


@pytest.mark.parametrize("overrides", [{"layers": 2}, {"num_layers": 0}, {"attention_head_dim": 4}])
def test_sizes_that_are_refused(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides)).replace("attention_head_dim", "heads of 4")):
        scratch(ancestry("dit").model, overrides)
