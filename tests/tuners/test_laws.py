# SPDX-License-Identifier: Apache-2.0
"""What holds of every kind of adapter on every architecture."""

import warnings
from collections import defaultdict
from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS


# BLAS rounds differently from one memory address to the next.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def adapted(make, config):
    tiny = make()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LearngeneLayer)}


@pytest.mark.parametrize("name", MODELS)
def test_identity_at_init(name, adder):
    tiny, expected = adapted(MODELS[name], adder(init_weights=True)), MODELS[name]()()
    assert all(not layer.get_delta_weight("default").any() for layer in layers(tiny.model).values())
    torch.testing.assert_close(tiny(), expected, **ROUNDING)
    assert not torch.allclose(adapted(MODELS[name], adder())(), expected, atol=1e-2)


def test_merging(pair, factored):
    """merged == unmerged, unmerging brings back what was before, and unloading leaves a plain model."""
    make, method = pair
    tiny, original = adapted(make, method()), make()
    before, output = {name: p.clone() for name, p in tiny.model.named_parameters()}, tiny()
    tiny.model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers(tiny.model).values())
    torch.testing.assert_close(tiny(), output, **ROUNDING)
    tiny.model.unmerge_adapter()
    for name, parameter in tiny.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny(), output, **ROUNDING)
    tiny.model = tiny.model.merge_and_unload()
    torch.testing.assert_close(tiny(), output, **ROUNDING)
    assert type(tiny.model) is type(original.model)
    shapes = {name: tensor.shape for name, tensor in tiny.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in original.model.state_dict().items()}


def test_saving(pair, tmp_path):
    """A file holds every number once; loading it brings back every bit, whichever way, without a word."""
    make, method = pair
    tiny = adapted(make, method())
    trained = {name: p for name, p in tiny.model.named_parameters() if p.requires_grad}
    tiny.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in trained.values())
    for low_cpu_mem_usage in (False, True):
        other = make(seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            other.model = PeftModel.from_pretrained(other.model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded = dict(other.model.named_parameters())
        assert all(torch.equal(loaded[name], parameter) for name, parameter in trained.items())
        torch.testing.assert_close(other(), tiny(), **ROUNDING)
        banks = {id(layer.bank("default")) for layer in layers(other.model).values()}
        assert banks == {id(bank) for layer in layers(other.model).values() for bank in layer.banks.values()}


def test_gradients(pair, factored):
    """The adapter's parameters are reached where the weights of the plain model are, and nothing else is."""
    make, method = pair
    plain = make()
    plain().square().mean().backward()
    alive = {name for name, p in plain.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
    tiny = adapted(make, method())
    tiny().square().mean().backward()
    for name, parameter in tiny.model.named_parameters():
        assert parameter.requires_grad == ("learngene_" in name), name
        assert parameter.requires_grad or parameter.grad is None, name
    users = defaultdict(list)
    for name, layer in layers(tiny.model).items():
        used = f"{name.removeprefix('base_model.model.')}.weight" in alive
        users[layer.scaler("default").weight].append(used)
        assert not used or all(p.grad.any() for p in layer.bank("default").parameters()), name
    for scaler, used in users.items():
        assert any(used) == bool(scaler.grad is not None and scaler.grad.any())


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv1d"])
def test_shared_gradient_is_the_sum_over_layers(name, method, factored):
    """Against the same layers with a bank each, in float64."""
    tiny = adapted(MODELS[name], method())
    tiny.model.double()
    tiny.inputs = {key: value.double() for key, value in tiny.inputs.items()}
    apart = deepcopy(tiny)
    copies = {}
    for key, layer in layers(apart.model).items():
        copies[key] = layer.bank_refs["default"][0] = deepcopy(layer.bank("default"))
    for either in (tiny, apart):
        either().square().sum().backward()
    for owner in layers(tiny.model).values():
        for bank in owner.banks.values():
            users = [key for key, layer in layers(tiny.model).items() if layer.bank("default") is bank]
            assert len(users) == (3 if owner.bank_scope == "group" else 1)
            for parameter, *parts in zip(bank.parameters(), *(copies[key].parameters() for key in users), strict=True):
                torch.testing.assert_close(parameter.grad, sum(part.grad for part in parts))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv1d"])
def test_gradients_are_finite_differences(name, method, factored):
    tiny = adapted(MODELS[name], method())
    tiny.model.double()
    tiny.inputs = {key: value.double() for key, value in tiny.inputs.items()}

    def loss():
        return tiny().square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in tiny.model.parameters() if p.requires_grad):
        at = int(torch.randint(parameter.numel(), (), generator=generator))
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(loss())
        estimate = (values[0] - values[1]) / 2e-5
        with torch.no_grad():
            parameter.view(-1)[at] += 1e-5
        torch.testing.assert_close(parameter.grad.view(-1)[at], estimate, rtol=1e-3, atol=1e-5)
