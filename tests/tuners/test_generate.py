# SPDX-License-Identifier: Apache-2.0
"""mode="generate": the weight is a function of the adapter, and there is no other weight to fall back on."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from diffusers_learngene.adapters import add_adapter
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS, run
from tuners.conftest import METHODS


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


@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d"])
def test_dropped_weight(name, generator):
    """Not in the state dict, but it follows the model's dtype; merging puts it where it was."""
    order = [key for key, _ in MODELS[name]().model.named_parameters()]
    model = get_peft_model(MODELS[name]().model, generator())
    assert not [key for key in model.state_dict() if key.endswith("base_layer.weight")]
    model.load_state_dict(model.state_dict())
    model.to(torch.bfloat16)
    assert all(layer.weight.dtype == torch.bfloat16 and layer.weight.numel() == 0 for layer in layers(model))
    model.merge_adapter()
    model.unmerge_adapter()
    assert not [key for key in model.state_dict() if key.endswith("base_layer.weight")]
    merged = model.merge_and_unload()
    assert [key for key, _ in merged.named_parameters()] == order
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_accelerate_s_checkpoints(generator, tmp_path):
    """accelerate's `save_state` and `load_state` of a model in training, which is strict about every tensor."""
    tiny = adapted(generator(), "dit")
    accelerator = Accelerator(cpu=True)
    try:
        tiny.model = accelerator.prepare(tiny.model)
        output = tiny()
        accelerator.save_state(str(tmp_path))
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.add_(parameter.requires_grad)
        assert not torch.allclose(tiny(), output)
        accelerator.load_state(str(tmp_path))
        torch.testing.assert_close(tiny(), output)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_what_is_zero_starts_as_zero(generator):
    """DiT's adaLN-Zero: read off the weights, of all matrices that share a scaler; training gets it off zero."""
    tiny = MODELS["dit"]()
    with torch.no_grad():
        for block in tiny.model.transformer_blocks:
            block.norm1.linear.weight.zero_()
        tiny.model.transformer_blocks[0].attn1.to_q.weight.zero_()
    tiny.model = get_peft_model(tiny.model, generator())
    for block in tiny.model.transformer_blocks:
        assert not block.norm1.linear.get_delta_weight("default").any()
        assert block.attn1.to_k.get_delta_weight("default").all()
    shared = block.attn1.to_q.scaler("default") is block.attn1.to_k.scaler("default")
    assert tiny.model.transformer_blocks[0].attn1.to_q.get_delta_weight("default").any() == shared
    optimizer = torch.optim.SGD([p for p in tiny.model.parameters() if p.requires_grad], 0.1)
    tiny().square().mean().backward()
    optimizer.step()
    assert all(block.norm1.linear.get_delta_weight("default").any() for block in tiny.model.transformer_blocks)


def test_weights_do_not_depend_on_the_model(generator):
    """The same adapter in a model with other weights gives the same layers."""
    tiny, other = adapted(generator()), MODELS["mlp"](seed=1)
    other.model = get_peft_model(other.model, generator())
    other.model.load_state_dict({k: v for k, v in tiny.model.state_dict().items() if "learngene_" in k}, strict=False)
    for mine, theirs in zip(layers(tiny.model), layers(other.model), strict=True):
        assert torch.equal(mine.get_delta_weight("default"), theirs.get_delta_weight("default"))


@pytest.mark.parametrize("kind", ["wave-generate", "fine-generate"])
def test_xavier_at_init(kind):
    """Random banks and scalers make weights of Xavier's variance."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 160)) for _ in range(4))
    model = get_peft_model(nn.ModuleDict({"blocks": blocks}), METHODS[kind]())
    weights = torch.stack([layer.get_delta_weight("default") for layer in layers(model)])
    assert weights.var().item() == pytest.approx(2 / 256, rel=0.2)


def test_nothing_but_the_adapter_can_be_active(generator):
    tiny = adapted(generator())
    tiny.model.add_adapter("delta", generator.config_cls(target_modules=["up"]))
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
    tiny.model.add_adapter("delta", generator.config_cls(target_modules=["down"], init_weights=False))
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
    tiny = adapted(generator.config_cls(init_weights=False))
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
        tiny.model = get_peft_model(tiny.model, generator.config_cls(init_weights=False))
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
    assert torch.equal(run(model, tiny.inputs), tiny())
