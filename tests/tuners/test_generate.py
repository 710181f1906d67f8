# SPDX-License-Identifier: Apache-2.0
"""mode="generate": the weight is a function of the adapter, and there is no other weight to fall back on."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from diffusers_learngene import WAVEConfig
from diffusers_learngene.adapters import add_adapter
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def layers(model):
    return [module for module in model.modules() if isinstance(module, LearngeneLayer)]


def adapted(config, name="mlp"):
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_copy(name, dtype, generator):
    """Only the adapter, the biases and what is not adapted stay in memory; merging brings the weights."""
    plain = MODELS[name]().model.to(dtype)
    dense = {id(m.weight) for n, m in plain.named_modules() if n.endswith(("up", "down"))}
    rest = sum(p.numel() for p in plain.parameters() if id(p) not in dense)
    devices = {m.weight.device for m in plain.modules() if hasattr(m, "weight")}
    model = get_peft_model(plain, generator())
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def numbers():
        return sum(p.numel() for p in model.parameters())

    assert numbers() == rest + adapter
    assert all(layer.weight.dtype == dtype and layer.weight.device in devices for layer in layers(model))
    assert all(not layer.weight.requires_grad for layer in layers(model))
    model.merge_adapter()
    assert numbers() == rest + adapter + sum(layer.in_features * layer.out_features for layer in layers(model))
    model.unmerge_adapter()
    assert numbers() == rest + adapter


def test_weights_do_not_depend_on_the_model(generator):
    """The same adapter in a model with other weights gives the same layers."""
    tiny, other = adapted(generator()), MODELS["mlp"](seed=1)
    other.model = get_peft_model(other.model, generator())
    other.model.load_state_dict({k: v for k, v in tiny.model.state_dict().items() if "learngene_" in k}, strict=False)
    for mine, theirs in zip(layers(tiny.model), layers(other.model), strict=True):
        assert torch.equal(mine.get_delta_weight("default"), theirs.get_delta_weight("default"))


def test_xavier_at_init():
    """Random templates and scalers make weights of Xavier's variance."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 160)) for _ in range(4))
    model = get_peft_model(nn.ModuleDict({"blocks": blocks}), WAVEConfig(mode="generate"))
    weights = torch.stack([layer.get_delta_weight("default") for layer in layers(model)])
    assert weights.var().item() == pytest.approx(2 / 256, rel=0.2)


def test_nothing_but_the_adapter_can_be_active(generator):
    tiny = adapted(generator())
    tiny.model.add_adapter("delta", WAVEConfig(target_modules=["up"]))
    with pytest.raises(RuntimeError, match="no weight of its own.*merge_and_unload"), tiny.model.disable_adapter():
        tiny()
    tiny.model.set_adapter("delta")
    for call in (tiny, tiny.model.merge_adapter, tiny.model.merge_and_unload, tiny.model.unload):
        with pytest.raises(RuntimeError, match="no weight of its own"):
            call()
    tiny.model.set_adapter("default")
    output = tiny()
    with pytest.raises(RuntimeError, match="no weight of its own"):
        tiny.model.unload()
    torch.testing.assert_close(tiny(), output)  # nothing was unloaded
    with pytest.raises(RuntimeError, match="no weight of its own"):
        tiny.model.merge_and_unload(adapter_names=["delta"])
    tiny.model = tiny.model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(tiny(), output, **CLOSE)


def test_disabling_while_merged(generator):
    tiny = adapted(generator())
    tiny.model.merge_adapter()
    output = tiny()
    with pytest.raises(RuntimeError, match="no weight of its own"), tiny.model.disable_adapter():
        tiny()
    torch.testing.assert_close(tiny(), output)
    tiny.model.set_adapter("default")  # PEFT warns and unmerges
    assert not any(layer.merged for layer in layers(tiny.model))
    torch.testing.assert_close(tiny(), output, **CLOSE)


def test_unloading_a_merged_model(generator):
    tiny = adapted(generator())
    output = tiny()
    tiny.model.merge_adapter()
    tiny.model = tiny.model.unload()
    torch.testing.assert_close(tiny(), output, **CLOSE)


@pytest.mark.parametrize("order", [["default", "delta"], ["delta", "default"]], ids="-".join)
def test_generate_and_add_together(order, generator):
    tiny = adapted(generator())
    alone = tiny()
    tiny.model.add_adapter("delta", WAVEConfig(target_modules=["down"], init_weights=False))
    tiny.model.base_model.set_adapter(order)
    output = tiny()
    assert not torch.allclose(output, alone, atol=1e-2)
    plain = MODELS["mlp"]().model
    with torch.no_grad():
        for name, layer in tiny.model.named_modules():
            if isinstance(layer, LearngeneLayer):
                weight = sum(layer.get_delta_weight(adapter) for adapter in layer._active())
                plain.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight)
    torch.testing.assert_close(plain(**tiny.inputs), output, **CLOSE)
    tiny.model.merge_adapter()
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.unmerge_adapter()
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model = tiny.model.merge_and_unload()
    torch.testing.assert_close(tiny(), output, **CLOSE)


def test_two_generators_are_one_too_many(generator):
    tiny = adapted(generator())
    tiny.model.add_adapter("other", generator())
    tiny.model.base_model.set_adapter(["default", "other"])
    for call in (tiny, tiny.model.merge_adapter, tiny.model.merge_and_unload):
        with pytest.raises(RuntimeError, match="default and other both generate"):
            call()
    for name in ("default", "other"):
        tiny.model.set_adapter(name)
        assert tiny().isfinite().all()
    tiny.model.delete_adapter("default")
    assert tiny().isfinite().all()


def test_generated_after_added(generator):
    """A second adapter may take the place of the weight that the first was added to; then the first needs it."""
    tiny = adapted(WAVEConfig(init_weights=False))
    added = tiny()
    tiny.model.add_adapter("other", generator())
    with pytest.raises(RuntimeError, match="no weight of its own"):
        tiny()
    tiny.model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(tiny(), added)


UNFIT = {
    "merged": "default is merged into it: unmerge first",
    "lora": "it is inside a Linear layer: merge and unload that adapter first",
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_cannot_go(case, generator):
    tiny = MODELS["mlp"]()
    if case == "merged":
        tiny.model = get_peft_model(tiny.model, WAVEConfig(init_weights=False))
        tiny.model.merge_adapter()
        output, call = tiny(), lambda: tiny.model.add_adapter("other", generator())
    else:
        tiny.model = inject_adapter_in_model(LoraConfig(target_modules=["up"], init_lora_weights=False), tiny.model)
        output, call = tiny(), lambda: add_adapter(tiny.model, generator(), "other")
    with pytest.raises(ValueError, match=UNFIT[case]):
        call()
    assert torch.equal(tiny(), output)


def test_meta_model(generator, tmp_path):
    """A model that has never had weights: nothing dense is allocated for it."""
    tiny = adapted(generator(modules_to_save=["head"], bias="all"))
    tiny.model.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = MODELS["mlp"]().model
    model = PeftModel.from_pretrained(skeleton, tmp_path, low_cpu_mem_usage=True)
    shapes = {name: p.shape for name, p in tiny.model.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(layer.weight.numel() == 0 for layer in layers(model))
    assert not any(p.is_meta for name, p in model.named_parameters() if "learngene_" in name)
    model.load_state_dict(tiny.model.state_dict(), assign=True)
    assert torch.equal(model(**tiny.inputs), tiny())
