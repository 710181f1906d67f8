# SPDX-License-Identifier: Apache-2.0
"""What holds of every kind of adapter on every architecture."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from diffusers_learngene.tuners.base_layer import LearngeneLayer


def adapted(make, config):
    tiny = make()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


def layers(model):
    return [module for module in model.modules() if isinstance(module, LearngeneLayer)]


def test_identity_at_init(make, adder):
    expected = make()()
    found = adapted(make, adder(init_weights=True))
    assert torch.equal(found(), expected)
    changed = adapted(make, adder())
    assert not torch.allclose(changed(), expected, atol=1e-3)


def test_merging(make, method, factored):
    """merged == unmerged, unmerging brings back what was before, and unloading leaves a plain model."""
    tiny, original = adapted(make, method()), make()
    before, output = {name: p.clone() for name, p in tiny.model.named_parameters()}, tiny()
    tiny.model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers(tiny.model))
    torch.testing.assert_close(tiny(), output, rtol=1e-4, atol=1e-5)
    tiny.model.unmerge_adapter()
    for name, parameter in tiny.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny(), output, rtol=1e-4, atol=1e-5)
    tiny.model = tiny.model.merge_and_unload()
    torch.testing.assert_close(tiny(), output, rtol=1e-4, atol=1e-5)
    assert type(tiny.model) is type(original.model)
    shapes = {name: tensor.shape for name, tensor in tiny.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in original.model.state_dict().items()}


def test_saving(make, method, tmp_path):
    """A file holds every number once, and loading it gives the same model, by either way of loading, without a word."""
    tiny = adapted(make, method())
    output = tiny()
    tiny.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    unique = {p.data_ptr(): p.numel() for p in tiny.model.parameters() if p.requires_grad}
    assert sum(tensor.numel() for tensor in saved.values()) == sum(unique.values())
    for low_cpu_mem_usage in (False, True):
        other = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            other.model = PeftModel.from_pretrained(other.model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(other(), output)
        assert {id(layer.bank("default")) for layer in layers(other.model)} == {
            id(bank) for layer in layers(other.model) for bank in layer.banks.values()
        }


def test_gradients(make, method, factored):
    """Every parameter of the adapter is reached, and nothing else is."""
    tiny = adapted(make, method())
    tiny().square().mean().backward()
    for name, parameter in tiny.model.named_parameters():
        assert parameter.requires_grad == ("learngene_" in name), name
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        # The last block of T5 / GPT2 / ... is reached too; what no output depends on is frozen or absent.
        assert reached == parameter.requires_grad, name


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv1d"])
def test_shared_gradient_is_the_sum_over_layers(name, method, factored):
    """Against the layers with banks of their own, and against finite differences, in float64."""
    from copy import deepcopy

    from models import MODELS

    def loss(tiny):
        return tiny().square().sum()

    tiny = adapted(MODELS[name], method())
    tiny.model.double()
    tiny.inputs = {key: value.double() for key, value in tiny.inputs.items()}
    loss(tiny).backward()

    apart = deepcopy(tiny)
    owners = {id(layer.bank("default")): layer for layer in layers(apart.model) if "default" in layer.banks}
    copies = {key: [] for key in owners}
    for layer in layers(apart.model):
        bank = layer.bank_refs["default"][0]
        copies[id(bank)].append(deepcopy(bank).requires_grad_().zero_grad() or deepcopy(bank))
        layer.bank_refs["default"] = [copies[id(bank)][-1]]
    apart.model.zero_grad()
    for banks in copies.values():
        for bank in banks:
            bank.zero_grad()
    loss(apart).backward()
    for key, owner in owners.items():
        shared = next(
            p.grad for n, p in tiny.model.named_parameters() if n == name_of(apart.model, owner.banks["default"])
        )
        total = sum(next(bank.parameters()).grad for bank in copies[key])
        torch.testing.assert_close(shared, total)

    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in tiny.model.parameters() if p.requires_grad):
        at = int(torch.randint(parameter.numel(), (), generator=generator))
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(loss(tiny))
                parameter.view(-1)[at] -= step
        estimate = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(parameter.grad.view(-1)[at], estimate, rtol=1e-4, atol=1e-5)


def name_of(model, bank):
    """Name of the bank's first parameter."""
    return next(name for name, p in model.named_parameters() if p is next(bank.parameters()))
