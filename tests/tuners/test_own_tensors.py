# SPDX-License-Identifier: Apache-2.0
"""`tensors_to_save` and `freeze_bank`: what an adapter trains of the model itself, and does not of its own."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from diffusers_learngene import FINEConfig, WAVEConfig, freeze_bank_, to_lora
from diffusers_learngene.adapters import add_adapter, load_adapter, save_adapter
from diffusers_learngene.tuners.own_tensors import own_names, with_stars
from diffusers_learngene.tuners.scalers import plain_name
from models import MODELS


NORMS = ["blocks.*.norm.weight", "blocks.1.up.bias"]
MEANT = {*(f"blocks.{i}.norm.weight" for i in range(3)), "blocks.1.up.bias"}


def trained(model):
    """Of the model itself."""
    named = model.named_parameters()
    return {plain_name(name) for name, p in named if p.requires_grad and "learngene_" not in name}


def disturb_(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)


@pytest.mark.parametrize("injected", [False, True])
def test_round_trip(method, injected, tmp_path):
    """Trained, saved and loaded, by PEFT and by `adapters`, each other's files as well."""
    tiny, config = MODELS["mlp"](), method(tensors_to_save=NORMS)
    tiny.model = add_adapter(tiny.model, config) if injected else get_peft_model(tiny.model, config)
    assert trained(tiny.model) == MEANT
    disturb_(tiny.model)
    save_adapter(tiny.model, tmp_path) if injected else tiny.model.save_pretrained(tmp_path)
    ours, theirs, frugal, more = (MODELS["mlp"]() for _ in range(4))
    load_adapter(ours.model, tmp_path)
    load_adapter(more.model, tmp_path, trainable=True)
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path)
    frugal.model = PeftModel.from_pretrained(frugal.model, tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    expected = {plain_name(name): tensor for name, tensor in tiny.model.state_dict().items()}
    for other, names in ((ours, set()), (theirs, set()), (frugal, MEANT), (more, MEANT)):
        found = {plain_name(name): tensor for name, tensor in other.model.state_dict().items()}
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert trained(other.model) == names
        torch.testing.assert_close(other(), tiny(), rtol=1e-4, atol=1e-5)


def test_trained_with_its_adapter():
    """As adapters come and go; each has its own."""
    model = get_peft_model(MODELS["mlp"]().model, WAVEConfig(tensors_to_save=NORMS))
    model.add_adapter("second", WAVEConfig(tensors_to_save=["head.bias"]))
    model.add_adapter("plain", WAVEConfig())
    assert trained(model) == MEANT
    for active, names in (
        ("second", {"head.bias"}),
        ("plain", set()),
        ("default", MEANT),
        (["default", "second"], MEANT | {"head.bias"}),
    ):
        model.base_model.set_adapter(active)
        assert trained(model) == names
    model.base_model.set_requires_grad("default", False)
    assert trained(model) == {"head.bias"}
    model.base_model.set_adapter("default", inference_mode=True)
    assert not trained(model)
    in_file = {name for name in get_peft_model_state_dict(model, adapter_name="second") if "learngene_" not in name}
    assert in_file == {"base_model.model.head.bias"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.*.norm.wight"], r"'blocks\.\*\.norm\.wight' is no tensor"),
        (["norm.weight"], "'norm.weight' is no tensor"),
        (["blocks.*.up.weight"], r"'blocks\.0\.up\.weight' is trained by this adapter, whose target it is"),
        (["blocks.1.norm.weight"], r"is trained by adapter 'default'"),
    ],
)
def test_refused_names(names, message):
    """Before the model is touched."""
    model = get_peft_model(MODELS["mlp"]().model, WAVEConfig(tensors_to_save=NORMS))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", WAVEConfig(tensors_to_save=names))
    assert set(model.state_dict()) == before and trained(model) == MEANT


def test_a_file_that_lacks_some():
    model = get_peft_model(MODELS["mlp"]().model, WAVEConfig(tensors_to_save=NORMS))
    state = get_peft_model_state_dict(model)
    del state["base_model.model.blocks.1.norm.weight"]
    with pytest.raises(ValueError, match=r"file of adapter 'default' lacks \['blocks\.1\.norm\.weight'\]"):
        set_peft_model_state_dict(model, state)


@pytest.mark.parametrize(
    "fields", [{"tensors_to_save": NORMS}, {"bias": "all"}, {"modules_to_save": ["head"]}], ids=str
)
def test_loading_keeps_the_models_dtype(fields, tmp_path):
    """Whether tensors are copied or replaced: an fp32 file makes no fp32 bias of a bf16 layer."""
    tiny = MODELS["mlp"]()
    save_adapter(add_adapter(tiny.model, WAVEConfig(**fields)), tmp_path)
    ours, theirs = MODELS["mlp"](), MODELS["mlp"]()
    for other in (ours, theirs):
        other.model.bfloat16()
        other.inputs = {name: value.bfloat16() for name, value in other.inputs.items()}
    load_adapter(ours.model, tmp_path)
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path, low_cpu_mem_usage=True)
    for other in (ours, theirs):
        rest = {p.dtype for name, p in other.model.named_parameters() if "learngene_" not in name}
        assert rest == {torch.bfloat16} and other().isfinite().all()


def test_a_lora_has_no_place_for_them():
    model = get_peft_model(MODELS["mlp"]().model, FINEConfig(tensors_to_save=NORMS))
    with pytest.raises(ValueError, match="a LoRA has no place for: merge_and_unload"):
        to_lora(model)


@pytest.mark.parametrize("how", ["config", "later"])
def test_frozen_banks(how, adder, tmp_path):
    """In the file as well, so that whoever loads it goes on as it was."""
    tiny = MODELS["mlp"]()
    tiny.model = get_peft_model(tiny.model, adder(freeze_bank=how == "config"))
    if how == "later":
        freeze_bank_(tiny.model)
    tiny.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["mlp"]().model, tmp_path, is_trainable=True)
    for model in (tiny.model, loaded):
        grads = {("_bank." in name, p.requires_grad) for name, p in model.named_parameters() if "learngene_" in name}
        assert grads == {(True, False), (False, True)}
        model.set_adapter("default")
        assert not any(p.requires_grad for name, p in model.named_parameters() if "_bank." in name)


def test_stars():
    names = [f"a.{i}.{part}.{j}.bias" for i in range(3) for part in ("b", "c") for j in range(2)] + ["d.0.bias", "e"]
    for chosen in (set(names), {"e", "d.0.bias"}, {name for name in names if ".b." in name}, {"a.0.b.1.bias"}, set()):
        patterns = with_stars(chosen, names)
        assert set(own_names(patterns, names)) == chosen and len(patterns) <= len(chosen)
    assert with_stars(set(names), names) == ["a.*.b.*.bias", "a.*.c.*.bias", "d.0.bias", "e"]
