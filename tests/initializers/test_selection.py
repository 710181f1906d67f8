# SPDX-License-Identifier: Apache-2.0
"""Selection of layers and elements, the baseline that a learngene has to beat."""

import pytest
import torch

from ancestries import ARCHITECTURES, OUTPUTS, ancestry, depth, select_layers, stock, width
from diffusers_learngene.functional.resize import residual_gain
from diffusers_learngene.initializers import selection
from models import run


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_size_is_the_ancestry(name):
    tiny = ancestry(name)
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    model = selection(tiny.model, {})
    assert type(model) is type(tiny.model) and model is not tiny.model
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], value) for key, value in before.items())
    close(run(model.eval(), tiny.inputs), tiny())
    for parameter in model.parameters():  # it is a copy
        parameter.data.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layers", [2, 5])
def test_depth(name, layers):
    """With a learngene's gain, the very layers that it takes; without, their branches are as they were."""
    tiny = ancestry(name)
    reference = select_layers(name, depth(name, layers))
    source = 2 if name in ("pixart", "flux", "sana", "lumina2") else 3
    gain = residual_gain(source, layers, normed=name == "bert")
    close(
        run(selection(tiny.model, depth(name, layers), gain=gain).eval(), tiny.inputs),
        run(reference, tiny.inputs),
    )

    plain, scaled = selection(tiny.model, depth(name, layers)).state_dict(), reference.state_dict()
    for key, value in plain.items():
        path = key.rpartition(".")[0]
        output = any(path.endswith(f".{role}") for role in OUTPUTS[name]) and path[-1] != "_"
        block = any(part.isdigit() for part in key.split(".")[:4])
        torch.testing.assert_close(value * gain if output and block else value, scaled[key])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("factor", [0.5, 2])
def test_width(name, factor):
    tiny = ancestry(name)
    overrides = {**width(name, factor), **depth(name, 2)}
    model = selection(tiny.model, overrides)
    shapes = {key: value.shape for key, value in stock(tiny.model, **overrides).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert run(model.eval(), tiny.inputs).isfinite().all()


@pytest.mark.parametrize(
    ("heads", "index"),
    [(1, torch.arange(0, 16, 2)), (2, torch.arange(16)), (3, torch.linspace(0, 15, 24).round().long())],
)
def test_elements_are_spread_evenly(heads, index):
    old = ancestry("dit").model.transformer_blocks[2]
    new = selection(ancestry("dit").model, {"num_attention_heads": heads}).transformer_blocks[2]
    assert torch.equal(new.attn1.to_q.weight, old.attn1.to_q.weight[index][:, index])
    assert torch.equal(new.attn1.to_q.bias, old.attn1.to_q.bias[index])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 2}, "no config key 'layers'"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 1}, "no repeated blocks"),
        ({"attention_head_dim": 4}, "heads of 4 instead of 8"),
    ],
)
def test_sizes_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        selection(ancestry("dit").model, overrides)
