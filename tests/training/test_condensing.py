# SPDX-License-Identifier: Apache-2.0
"""The elastic model: a learngene as a module that is trained in many sizes at once."""

import pytest
import torch

from ancestries import ancestry, depth, each_method, learngene, lossless, width
from diffusers_learngene import KINDConfig, Learngene
from diffusers_learngene.training.condensing import ElasticModel
from models import run


def condensed(name, *factors, method="wave"):
    """A learngene with tensors of their own for some more widths."""
    model = ancestry(name).model
    return Learngene.condense(model, lossless(model, method), widths=[width(name, factor) for factor in factors])


def at(elastic, size):
    """The elastic model as the model of one size."""
    return lambda **inputs: elastic(size, **inputs)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@each_method
@pytest.mark.parametrize("name", ["dit", "sd3", "sana", "gpt2", "llama"])
def test_a_size_computes_what_its_descendant_does(name, method):
    """Every size, of several depths and widths; also after a step of training, whatever the step did."""
    one = condensed(name, 2, 0.5, method=method)
    sizes = [{}, depth(name, 2), depth(name, 5), width(name, 2), {**width(name, 0.5), **depth(name, 4)}]
    elastic, inputs = ElasticModel(one, sizes).eval(), ancestry(name).inputs
    for size, overrides in enumerate(sizes):
        assert_close(run(at(elastic, size), inputs), run(one.descend(**overrides).eval(), inputs))
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.mul_(1.1)
    trained = elastic.learngene()
    for size in (1, 4):
        output = run(at(elastic, size), inputs)
        assert_close(output, run(trained.descend(**sizes[size]).eval(), inputs))
        assert not torch.allclose(output, run(one.descend(**sizes[size]).eval(), inputs))


@each_method
def test_its_parameters_are_the_tensors_of_the_learngene(method):
    one = condensed("dit", 2, method=method)
    before = {key: value.clone() for key, value in one.tensors.items()}
    elastic = ElasticModel(one, [{}, {"num_layers": 6}])
    assert sum(parameter.numel() for parameter in elastic.parameters()) == one.num_parameters
    assert not list(elastic.buffers())
    again = elastic.learngene()
    assert again.tensors.keys() == before.keys() and all(torch.equal(again.tensors[k], v) for k, v in before.items())
    for parameter in elastic.parameters():
        parameter.data.zero_()
    assert all(torch.equal(one.tensors[key], value) for key, value in before.items())  # it works on copies


@each_method
@pytest.mark.parametrize("name", ["dit", "llama"])
def test_gradients(name, method):
    """A size reaches all templates and the tensors of its own width, of the layers that it selects."""
    elastic = ElasticModel(condensed(name, 2, method=method), [depth(name, 2), {**width(name, 2), **depth(name, 4)}])
    for size, (own, other) in enumerate([("sizes/0/", "sizes/1/"), ("sizes/1/", "sizes/0/")]):
        elastic.zero_grad()
        run(at(elastic, size), ancestry(name).inputs).square().mean().backward()
        for key, parameter in elastic.tensors.items():
            if key.startswith(other):
                assert parameter.grad is None, key
            elif not key.startswith("sizes/") or "/scalers/" in key or key.endswith(("/bias", "norm/weight")):
                assert parameter.grad.isfinite().all() and parameter.grad.any(), key
        scalers = next(p.grad for key, p in elastic.tensors.items() if key.startswith(f"{own}scalers/"))
        used = scalers.flatten(1).any(1)
        assert used.tolist() == ([True, False, True] if size == 0 else [True, True, True])
    assert own  # the loop ran


def test_gradient_of_the_templates_sums_over_the_layers():
    """Against finite differences, in float64."""
    elastic = ElasticModel(learngene("vit"), [{"num_hidden_layers": 4}]).double()
    inputs = {key: value.double() for key, value in ancestry("vit").inputs.items()}
    # The skeleton's own dtype plays no part: all of its tensors are replaced.
    templates = elastic.tensors["templates/vit/layers/*/mlp/fc1"]

    def loss():
        return run(at(elastic, 0), inputs).square().sum()

    loss().backward()
    direction = torch.randn(templates.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-5
    with torch.no_grad():
        templates += step * direction
        up = loss()
        templates -= 2 * step * direction
        down = loss()
    slope = (templates.grad * direction).sum()
    torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-3, atol=1e-8)


def test_the_learngene_records_the_sizes():
    one = learngene("dit")
    sizes = [{}, {"num_layers": 2}, {"num_layers": 12}]
    distilled = ElasticModel(one, sizes).learngene()
    assert distilled.config.condensed_for == sizes and one.config.condensed_for == []
    assert all(distilled.seen(size) for size in sizes) and not distilled.seen({"num_layers": 7})
    assert distilled.seen({"num_layers": 3})  # the ancestry's own


def test_an_unknown_width_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"the width of {'num_attention_heads': 4}: give it in widths="):
        ElasticModel(learngene("dit"), [{}, {"num_attention_heads": 4}])
    with pytest.raises(ValueError, match="no config key 'layers'"):
        ElasticModel(learngene("dit"), [{"layers": 4}])


def test_kind_is_refused_because_it_has_one_size_and_needs_a_gate():
    with pytest.raises(ValueError, match="KIND has one size"):
        ElasticModel(Learngene.condense(ancestry("dit").model, KINDConfig()), [{}])


@each_method
@pytest.mark.parametrize("name", ["dit", "vit"])
def test_gradient_checkpointing_changes_no_gradient(name, method):
    gradients = []
    for checkpointing in (False, True):
        elastic = ElasticModel(learngene(name, method), [depth(name, 4)]).train()
        if checkpointing:
            elastic.enable_gradient_checkpointing()
        torch.manual_seed(0)
        run(at(elastic, 0), ancestry(name).inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in elastic.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain)


def test_scalers_have_a_learning_rate_of_their_own():
    elastic = ElasticModel(condensed("dit", 2), [{}])
    others, scalers = elastic.param_groups(1e-3, 5e-3)
    assert (others["lr"], scalers["lr"]) == (1e-3, 5e-3) and others["weight_decay"] == scalers["weight_decay"] == 0
    assert len(others["params"]) + len(scalers["params"]) == len(elastic.tensors)
    keys = [key for key, tensor in elastic.tensors.items() if any(tensor is one for one in scalers["params"])]
    assert keys and all("/scalers/" in key for key in keys)
