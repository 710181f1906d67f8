# SPDX-License-Identifier: Apache-2.0
"""`diffusers_learngene.adapters`: adapters on plain models, and files that are not what they say."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load, load_file, save_file

from diffusers_learngene import FINEConfig, WAVEConfig
from diffusers_learngene.adapters import add_adapter, load_adapter, save_adapter
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS
from tuners.conftest import TAILORED


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def adapter_tensors(model, name):
    return {key.replace(f".{name}.", "."): p for key, p in model.named_parameters() if f".{name}." in key}


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "gpt2", "conv2d"])
def test_round_trip(name, method, tmp_path):
    tiny = MODELS[name]()
    assert add_adapter(tiny.model, method()) is tiny.model
    trained = {key for key, p in tiny.model.named_parameters() if p.requires_grad}
    assert trained and all("learngene_" in key for key in trained)
    save_adapter(tiny.model, tmp_path)
    ours, theirs = MODELS[name](), MODELS[name]()
    load_adapter(ours.model, tmp_path, "other")
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path)
    torch.testing.assert_close(ours(), tiny(), **CLOSE)
    torch.testing.assert_close(theirs(), tiny(), **CLOSE)
    expected, found = adapter_tensors(tiny.model, "default"), adapter_tensors(ours.model, "other")
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert not any(p.requires_grad for p in found.values())


def test_peft_s_files(method, tmp_path):
    tiny, other = MODELS["dit"](), MODELS["dit"]()
    tiny.model = get_peft_model(tiny.model, method(modules_to_save=["proj_out_2"], bias="learngene_only"))
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    tiny.model.save_pretrained(tmp_path)
    load_adapter(other.model, tmp_path, trainable=True)
    torch.testing.assert_close(other(), tiny(), **CLOSE)
    trained = {key.removeprefix("base_model.model.") for key, p in tiny.model.named_parameters() if p.requires_grad}
    assert {key for key, p in other.model.named_parameters() if p.requires_grad} == trained


def test_several(tmp_path):
    """Adding and loading beside what is there; diffusers' own methods go on working where the model has them."""
    tiny = MODELS["sd3"]()
    plain = tiny()
    add_adapter(tiny.model, WAVEConfig(init_weights=False), "first")
    first = tiny()
    add_adapter(tiny.model, WAVEConfig(init_weights=False, template_size=4), "second")
    second = tiny()
    for name in ("first", "second"):
        save_adapter(tiny.model, tmp_path / name, name)
    other = MODELS["sd3"]()
    load_adapter(other.model, tmp_path / "second", "x")
    load_adapter(other.model, tmp_path / "first", "y")
    torch.testing.assert_close(other(), first, **CLOSE)
    other.model.set_adapters("x")
    torch.testing.assert_close(other(), second, **CLOSE)
    other.model.disable_adapters()
    torch.testing.assert_close(other(), plain, **CLOSE)


def test_dtype_of_the_model_is_not_the_adapter_s(tmp_path):
    tiny = MODELS["dit"]()
    add_adapter(tiny.model, WAVEConfig(init_weights=False))
    save_adapter(tiny.model, tmp_path)
    model = load_adapter(MODELS["dit"]().model.bfloat16(), tmp_path)
    assert {p.dtype for key, p in model.named_parameters() if "learngene_" in key} == {torch.float32}


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names(name):
    with pytest.raises(ValueError, match="must be a name without dots"):
        add_adapter(MODELS["mlp"]().model, WAVEConfig(), name)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    tiny = MODELS["dit"]()
    add_adapter(tiny.model, WAVEConfig(init_weights=False))
    save_adapter(tiny.model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_learngene.hub.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tiny.model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_are_taken(tmp_path):
    model = add_adapter(MODELS["mlp"]().model, WAVEConfig())
    save_adapter(model, tmp_path)
    for call in (lambda: add_adapter(model, WAVEConfig()), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="There is an adapter 'default' already"):
            call()
    with pytest.raises(ValueError, match="no adapter 'other' to save, only \\['default'\\]"):
        save_adapter(model, tmp_path, "other")


def test_a_config_that_does_not_fit_leaves_the_first_adapter():
    tiny = MODELS["mlp"]()
    add_adapter(tiny.model, WAVEConfig(init_weights=False))
    output = tiny()
    with pytest.raises(ValueError, match="larger than"):
        add_adapter(tiny.model, WAVEConfig(template_size=100), "second")
    assert list(tiny.model.peft_config) == ["default"] and torch.equal(tiny(), output)
    add_adapter(tiny.model, WAVEConfig(template_size=2, num_templates=2), "second")


def test_peft_models_have_their_own_methods(tmp_path):
    model = get_peft_model(MODELS["mlp"]().model, WAVEConfig())
    with pytest.raises(ValueError, match="methods of its own"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_what_diffusers_save_lora_adapter_writes(name, method, tmp_path):
    """diffusers reads no adapters but LoRAs, and says so; `load_adapter` reads ours."""
    tiny, ours, theirs = (MODELS[name]() for _ in range(3))
    tiny.model.add_adapter(method(), "trained")
    tiny.model.save_lora_adapter(tmp_path, adapter_name="trained")
    load_adapter(ours.model, tmp_path, "trained")
    expected, found = adapter_tensors(tiny.model, "trained"), adapter_tensors(ours.model, "trained")
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    torch.testing.assert_close(ours(), tiny(), **CLOSE)
    before = theirs.model.state_dict().keys()
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        theirs.model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert theirs.model.state_dict().keys() == before


@pytest.mark.parametrize("described", [True, False])
def test_what_a_pipelines_save_lora_weights_writes(described, method, tmp_path):
    """It takes any dict of tensors. Neither side loads it, and ours says what to do instead."""
    tiny, other = MODELS["sd3"](), MODELS["sd3"]()
    add_adapter(tiny.model, method())
    config = tiny.model.peft_config["default"].to_dict() if described else None
    state = get_peft_model_state_dict(tiny.model)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=config)
    message = "load it with the pipeline's load_lora_weights.*save_adapter" if described else "is not the config of"
    with pytest.raises(ValueError, match=message):
        load_adapter(other.model, tmp_path)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder_3": None, "tokenizer_3": None}
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        StableDiffusion3Pipeline(**parts, transformer=other.model).load_lora_weights(tmp_path)


def test_damaged_files_of_diffusers(tmp_path):
    tiny = MODELS["sd3"]()
    tiny.model.add_adapter(WAVEConfig(), "trained")
    tiny.model.save_lora_adapter(tmp_path, adapter_name="trained")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_adapter(MODELS["sd3"]().model, tmp_path)
    save_file(load(good), path, {"lora_adapter_metadata": json.dumps({"peft_type": "LORA", "r": 4})})
    with pytest.raises(ValueError, match="peft_type='LORA', which is none of"):
        load_adapter(MODELS["sd3"]().model, tmp_path)


# Files that are not what they say


NAMES = {
    WAVEConfig: ("wave_bank.templates", "wave_scaler.weight"),
    FINEConfig: ("fine_bank.u", "fine_sigma.weight"),
    TAILORED: ("kind_bank.u", "kind_sigma.weight"),
}
PATTERNS = {
    WAVEConfig: {"template_pattern": {"blocks.*.up": [8, 3, 3]}},
    FINEConfig: {"group_ranks": {"blocks.*.up": 3}},
    TAILORED: {"group_sizes": {"blocks.*.up": [1, 2]}},
}


@pytest.fixture(scope="module", params=NAMES, ids=["wave", "fine", "kind"])
def good(request, tmp_path_factory):
    """Folders of a good adapter of the MLP by mode, for every method, and what its tensors are called."""
    folders = {"names": NAMES[request.param], "pattern": PATTERNS[request.param]}
    for mode in ("add", "generate"):
        folders[mode] = tmp_path_factory.mktemp(mode)
        model = add_adapter(MODELS["mlp"]().model, request.param(mode=mode, init_weights=False))
        save_adapter(model, folders[mode])
    return folders


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


UP = "base_model.model.blocks.0.up.learngene_"


def poison(value):
    def change(tensors, bank, scaler):
        tensors[scaler].view(-1)[0] = value

    return change


TENSORS = {
    "missing": (lambda t, bank, scaler: t.pop(bank), "missing \\['{bank}'\\], unexpected \\[\\]"),
    "unexpected": (lambda t, bank, scaler: t.update(extra=torch.ones(1)), r"unexpected \['extra'\]"),
    "renamed": (lambda t, bank, scaler: t.update(x=t.pop(scaler)), "missing \\['{scaler}'\\], unexpected \\['x'\\]"),
    "shape": (lambda t, bank, scaler: t.update({bank: t[bank][:, 1:].contiguous()}), "{bank} has shape"),
    "nan": (poison(float("nan")), "{scaler} holds values"),
    "infinite": (poison(float("-inf")), "{scaler} holds values"),
    "integers": (lambda t, bank, scaler: t.update({scaler: t[scaler].int()}), "{scaler} holds values"),
}
CONFIGS = {
    "unknown key": ({"trust_remote_code": True}, r"unknown keys \['trust_remote_code'\]"),
    "other type": ({"peft_type": "LORA"}, "peft_type='LORA', which is none of"),
    "no type": ({"peft_type": None}, "has no peft_type"),
    "wrong value": ({"mode": "replace"}, "mode='replace'"),
    "wrong size": ("pattern", "has shape"),
    "other layers": ({"target_modules": ["up"]}, "unexpected .*down"),
}


def refused(folder, message):
    """The file is refused with this message, and the model is as it was."""
    tiny = MODELS["mlp"]()
    names, output = set(tiny.model.state_dict()), tiny()
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny.model, folder)
    assert not any(isinstance(module, LearngeneLayer) for module in tiny.model.modules())
    assert set(tiny.model.state_dict()) == names and torch.equal(tiny(), output)


@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(case, mode, good, tmp_path):
    folder = shutil.copytree(good[mode], tmp_path / "copy")
    names = dict(zip(("bank", "scaler"), (UP + name for name in good["names"]), strict=True))
    change, message = TENSORS[case]
    edit_tensors(folder, lambda tensors: change(tensors, **names))
    refused(folder, message.format(**names))


@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs(case, mode, good, tmp_path):
    folder = shutil.copytree(good[mode], tmp_path / "copy")
    changes, message = CONFIGS[case]
    edit_config(folder, **(good["pattern"] if changes == "pattern" else changes))
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000, "{}", "\x00"])
def test_configs_that_are_none(text, good, tmp_path):
    folder = shutil.copytree(good["add"], tmp_path / "copy")
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "is not JSON|is not the config of an adapter")


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_truncated_files(keep, good, tmp_path):
    folder = shutil.copytree(good["add"], tmp_path / "copy")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "is not a safetensors file")


def test_pickles_are_not_read(good, tmp_path):
    folder = shutil.copytree(good["add"], tmp_path / "copy")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    refused(folder, "There is no adapter_model.safetensors in .* Pickled weights .* are never read")


def test_nothing_there(tmp_path):
    refused(tmp_path, "There is no adapter_config.json")


def test_models_of_another_size(good):
    with pytest.raises(ValueError, match="not found in the base model"):
        load_adapter(MODELS["dit"]().model, good["add"])


def test_lora_beside(good):
    """An adapter of another method keeps working."""
    tiny = MODELS["sd3"]()
    tiny.model.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False), "lora")
    lora = tiny()
    add_adapter(tiny.model, WAVEConfig(target_modules=["ff.net.2"]), "wave")
    tiny.model.set_adapters(["lora", "wave"])
    torch.testing.assert_close(tiny(), lora, **CLOSE)


def test_hub(good, hub, tmp_path):
    """From the Hub as from a folder, at the revision that is asked for; pickles stay where they are."""
    api = HfApi()
    api.create_repo("me/adapter")
    first = api.upload_folder(repo_id="me/adapter", folder_path=good["add"]).oid
    api.delete_file("adapter_model.safetensors", "me/adapter")
    api.upload_file(path_or_fileobj=b"pickle", path_in_repo="adapter_model.bin", repo_id="me/adapter")
    local, remote = MODELS["mlp"](), MODELS["mlp"]()
    load_adapter(local.model, good["add"])
    load_adapter(remote.model, "me/adapter", revision=first)
    assert torch.equal(remote(), local())
    refused("me/adapter", "There is no adapter_model.safetensors in me/adapter. Pickled weights")
    assert not any(path.endswith(".bin") for method, path in hub.requests if method == "GET")
