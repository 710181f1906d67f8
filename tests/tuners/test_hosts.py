# SPDX-License-Identifier: Apache-2.0
"""The methods in the hands of diffusers, transformers and PEFT, through their own calls."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import convert_to_lora
from transformers import ViTForImageClassification

from diffusers_learngene import FINEConfig, WAVEConfig
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import CLASS, MODELS, gate


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Already unmerged")


def layers(model):
    return [module for module in model.modules() if isinstance(module, LearngeneLayer)]


def test_inject_adapter_in_model(method):
    tiny, wrapped = MODELS["dit"](), MODELS["dit"]()
    torch.manual_seed(0)
    assert inject_adapter_in_model(method(), tiny.model) is tiny.model
    torch.manual_seed(0)
    wrapped.model = get_peft_model(wrapped.model, method())
    torch.testing.assert_close(tiny(), wrapped(), **CLOSE)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_diffusers_model(name, adder):
    """`PeftAdapterMixin`: add, weigh, disable, scale, fuse, delete, unload."""
    tiny = MODELS[name]()
    plain, model = tiny(), tiny.model
    model.add_adapter(adder(), "first")
    first = tiny()
    model.add_adapter(adder(layers_to_transform=[1]), "second")
    second = tiny()
    assert not torch.allclose(first, plain, atol=1e-2) and not torch.allclose(first, second, atol=1e-2)
    model.set_adapters(["first", "second"], [0.0, 1.0])
    torch.testing.assert_close(tiny(), second, **CLOSE)
    model.set_adapters("first")
    torch.testing.assert_close(tiny(), first, **CLOSE)
    assert model.active_adapters() == ["first"]
    model.disable_adapters()
    torch.testing.assert_close(tiny(), plain, **CLOSE)
    model.enable_adapters()
    torch.testing.assert_close(tiny(), first, **CLOSE)

    model.set_adapters("first", 0.5)
    half = tiny()
    model.set_adapters("first", 1.0)
    tiny.inputs["joint_attention_kwargs"] = {"scale": 0.5}
    torch.testing.assert_close(tiny(), half, **CLOSE)
    tiny.inputs["joint_attention_kwargs"] = {"scale": 0.0}
    torch.testing.assert_close(tiny(), plain, **CLOSE)
    del tiny.inputs["joint_attention_kwargs"]
    torch.testing.assert_close(tiny(), first, **CLOSE)

    model.fuse_lora(safe_fusing=True)
    assert all(layer.merged for layer in layers(model))
    torch.testing.assert_close(tiny(), first, **CLOSE)
    model.unfuse_lora()
    torch.testing.assert_close(tiny(), first, **CLOSE)
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(tiny(), half, **CLOSE)
    model.unfuse_lora()
    model.set_adapters("first", 1.0)
    model.delete_adapters("second")
    torch.testing.assert_close(tiny(), first, **CLOSE)
    model.unload_lora()
    assert not layers(model)
    torch.testing.assert_close(tiny(), plain, **CLOSE)


def test_diffusers_pipeline(adder):
    transformer = MODELS["sd3"]().model
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.zeros(1, 3, 12), "pooled_prompt_embeds": torch.zeros(1, 10)}

    def image(**kwargs):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent", "height": 8, "width": 8}
        with gate(transformer, [CLASS]):
            return pipe(**prompt, **call, generator=generator, **kwargs).images

    plain = image()
    transformer.add_adapter(adder(), "first")
    first = image()
    assert not torch.allclose(first, plain, atol=1e-2)
    assert pipe.get_active_adapters() == ["first"] and pipe.get_list_adapters() == {"transformer": ["first"]}
    torch.testing.assert_close(image(joint_attention_kwargs={"scale": 0.0}), plain, **CLOSE)
    pipe.set_adapters("first", 0.0)
    torch.testing.assert_close(image(), plain, **CLOSE)
    pipe.set_adapters("first")
    pipe.fuse_lora()
    torch.testing.assert_close(image(), first, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_model(adder, tmp_path):
    """Its own integration: add, save, load beside, switch, delete."""
    tiny = MODELS["vit"]()
    plain = tiny()
    tiny.model.add_adapter(adder(), "first")
    first = tiny()
    assert not torch.allclose(first, plain, atol=1e-3)
    tiny.model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = MODELS["vit"]()
    other.model.load_adapter(str(tmp_path / "adapter"), "loaded")
    torch.testing.assert_close(other(), first, **CLOSE)
    other.model.disable_adapters()
    torch.testing.assert_close(other(), plain, **CLOSE)
    other.model.enable_adapters()
    other.model.add_adapter(adder(), "second")
    other.model.set_adapter("loaded")
    torch.testing.assert_close(other(), first, **CLOSE)
    other.model.delete_adapter("second")
    torch.testing.assert_close(other(), first, **CLOSE)

    MODELS["vit"]().model.save_pretrained(tmp_path / "base")
    wrapped = MODELS["vit"]()
    wrapped.model = PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter"
    )
    torch.testing.assert_close(wrapped(), first, **CLOSE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["dit", "gpt2"])
def test_conversion_to_lora(name, adder):
    """PEFT approximates an added adapter by a LoRA, at full rank without loss. What is not a delta is refused."""
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, adder())
    config, state = convert_to_lora(tiny.model, rank=16)
    other = MODELS[name]()
    other.model = get_peft_model(other.model, config)
    other.model.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
    torch.testing.assert_close(other(), tiny(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "mode"), [("mlp", "generate"), ("conv2d", "add")])
@pytest.mark.parametrize("config_cls", [WAVEConfig, FINEConfig])
def test_no_conversion_to_lora(name, mode, config_cls):
    model = get_peft_model(MODELS[name]().model, config_cls(mode=mode))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
