# SPDX-License-Identifier: Apache-2.0
"""FINE adapters as LoRAs, in the hands of PEFT and diffusers alone."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from diffusers_learngene import FINEConfig, WAVEConfig, save_as_lora, to_lora
from diffusers_learngene.adapters import add_adapter
from models import MODELS, run
from tuners.conftest import METHODS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ["fine", "fine-odd", "fine-apart"]
PATTERN = {"blocks.*.up": 5, "blocks.*.down": 3}
pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys", "error:Loading adapter weights from")


def adapted(name, config):
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d", "dit", "sd3", "gpt2", "llama"])
def test_stock_peft(name, kind, tmp_path):
    """The same outputs from a folder that PEFT reads, with another scale, in layers of any kind."""
    tiny = adapted(name, METHODS[kind]())
    for layer in tiny.model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.6)
    save_as_lora(tiny.model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = MODELS[name]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path)
    assert other.model.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(other(), tiny(), **CLOSE)


def test_nothing_is_approximated():
    """B A is U diag(sigma) V^T of the same tensors: no SVD has been near them."""
    tiny = adapted("dit", FINEConfig(init_weights=False, r=7))
    _, state = to_lora(tiny.model)
    bank = tiny.model.transformer_blocks[0].attn1.to_q.bank("default")
    key = tiny.model.transformer_blocks[1].attn1.to_k
    name = "base_model.model.transformer_blocks.1.attn1.to_k"
    assert torch.equal(state[f"{name}.lora_B.weight"], bank.u[16:32])
    assert torch.equal(state[f"{name}.lora_A.weight"], key.scaler("default").weight[:, None] * bank.v.T)


@pytest.mark.parametrize("name", ["mlp", "conv1d"])
def test_ranks_by_group(name, tmp_path):
    tiny = adapted(name, FINEConfig(init_weights=False, group_ranks=PATTERN))
    config, _ = to_lora(tiny.model)
    assert {config.r, *config.rank_pattern.values()} == {3, 5} and config.alpha_pattern == config.rank_pattern
    save_as_lora(tiny.model, tmp_path)
    other = MODELS[name]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path)
    torch.testing.assert_close(other(), tiny(), **CLOSE)


def test_what_else_was_trained(tmp_path):
    config = FINEConfig(init_weights=False, modules_to_save=["proj_out_2"], bias="learngene_only")
    tiny = adapted("dit", config)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    save_as_lora(tiny.model, tmp_path)
    other = MODELS["dit"]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path)
    torch.testing.assert_close(other(), tiny(), **CLOSE)
    with pytest.raises(ValueError, match="diffusers loads LoRAs alone, but .*proj_out_2"):
        save_as_lora(tiny.model, tmp_path / "diffusers", component="transformer")
    assert not (tmp_path / "diffusers").exists()


def test_injected_and_named():
    """The function on a plain model, and the method of a PeftModel, give the same."""
    injected, wrapped = MODELS["sd3"](), MODELS["sd3"]()
    torch.manual_seed(0)
    add_adapter(injected.model, FINEConfig(init_weights=False), "x")
    torch.manual_seed(0)
    wrapped.model = get_peft_model(wrapped.model, FINEConfig(init_weights=False))
    (config, state), (expected_config, expected) = to_lora(injected.model, "x"), wrapped.model.to_lora()
    assert config == expected_config and state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_stock_add_adapter():
    """diffusers' `add_adapter`, beside the adapter that it is a copy of."""
    tiny = MODELS["sd3"]()
    plain = tiny()
    add_adapter(tiny.model, FINEConfig(init_weights=False), "fine")
    fine = tiny()
    config, state = to_lora(tiny.model, "fine")
    other = MODELS["sd3"]()
    other.model.add_adapter(config, "lora")
    set_peft_model_state_dict(other.model, state, "lora")
    torch.testing.assert_close(other(), fine, **CLOSE)
    other.model.set_adapters("lora", 0.0)
    torch.testing.assert_close(other(), plain, **CLOSE)


def pipeline(name):
    transformer = MODELS[name]().model
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, "transformer": transformer}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if name == "flux":
        return FluxPipeline(**parts)
    return StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


@pytest.mark.parametrize("ranks", ["one", "several"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_stock_load_lora_weights(name, ranks, tmp_path):
    """Also without the config in the file, which other programs may not write."""
    tiny = MODELS[name]()
    config = FINEConfig(init_weights=False, r=4)
    if ranks == "several":
        key = "transformer_blocks.*.ff.net.2"
        config = FINEConfig(init_weights=False, r=4, group_ranks={key: 9})
    add_adapter(tiny.model, config)
    save_as_lora(tiny.model, tmp_path, component="transformer")
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_lora_weights.safetensors"}
    for source in (tmp_path, load_file(tmp_path / "pytorch_lora_weights.safetensors")):
        pipe, other = pipeline(name), MODELS[name]()
        pipe.load_lora_weights(source)
        other.model = pipe.transformer
        assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
        torch.testing.assert_close(other(), tiny(), **CLOSE)
    pipe.fuse_lora()
    torch.testing.assert_close(other(), tiny(), **CLOSE)
    pipe.unload_lora_weights()


def test_names_that_end_like_others():
    """A target at the root is not mistaken for every layer of that name."""
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 4), "head": nn.Linear(6, 4)}) for _ in range(2))
    make = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(6, 4)})
    model = get_peft_model(make, FINEConfig(target_modules=r"head|blocks\.\d\.up"))
    config, _ = to_lora(model)
    lora = get_peft_model(model.unload(), config)
    assert set(lora.targeted_module_names) == {"head", "blocks.0.up", "blocks.1.up"}


def test_paddings():
    """A LoRA of a convolution pads with zeros, so only such a layer has one."""
    tiny = adapted("conv2d", FINEConfig(init_weights=False, target_modules=["up", "shortcut"]))
    config, tensors = to_lora(tiny.model)
    lora = get_peft_model(MODELS["conv2d"]().model, config)
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(run(lora, tiny.inputs), tiny(), rtol=1e-4, atol=1e-5)
    tiny.model.get_base_model().shortcut.base_layer.padding_mode = "reflect"
    with pytest.raises(ValueError, match="shortcut has padding_mode='reflect'"):
        to_lora(tiny.model)


def test_refused():
    with pytest.raises(ValueError, match='"generate": it replaces weights, and a LoRA is added .* merge_and_unload'):
        to_lora(adapted("mlp", FINEConfig(mode="generate")).model)
    with pytest.raises(ValueError, match="is a WAVEConfig: only FINE's are LoRAs"):
        to_lora(adapted("mlp", WAVEConfig()).model)
    with pytest.raises(ValueError, match="is a LoraConfig: only FINE's"):
        to_lora(adapted("mlp", LoraConfig(target_modules=["up"])).model)
    with pytest.raises(ValueError, match="There is no adapter 'x', only \\['default'\\]"):
        to_lora(adapted("mlp", FINEConfig()).model, "x")
    with pytest.raises(ValueError, match="There is no adapter 'default', only \\[\\]"):
        to_lora(MODELS["mlp"]().model)
