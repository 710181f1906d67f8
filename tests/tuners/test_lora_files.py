# SPDX-License-Identifier: Apache-2.0
"""FINE adapters of several components in one file, which the stock loader of every pipeline reads whole."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SkyReelsV2Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders import lora_pipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_learngene import FINEConfig, save_as_lora
from diffusers_learngene.adapters import add_adapter
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS
from text_to_image import pipeline


FILE = "pytorch_lora_weights.safetensors"


def wan_transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=8,
    )


def wan():
    """Two transformers, as Wan 2.2 has them."""
    torch.manual_seed(0)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "tokenizer": None, "text_encoder": None}
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    return WanPipeline(**parts, vae=vae, transformer=wan_transformer(), transformer_2=wan_transformer())


def make(family):
    if family == "wan":
        return wan()
    pipe = pipeline(family)
    if family in MODELS:  # with layers that share
        pipe.register_modules(transformer=MODELS[family]().model)
    return pipe


# What every pipeline's loader knows.
COMPONENTS = {
    "sd": ["unet", "text_encoder"],
    "sdxl": ["unet", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "text_encoder", "text_encoder_2"],
    "flux": ["transformer", "text_encoder"],
    "wan": ["transformer", "transformer_2"],
}


def deltas(model):
    """What an adapter adds to every weight that it changes: ours, or a LoRA."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            adapters = list(module.scaling) if isinstance(module, LearngeneLayer) else list(module.lora_A)
            found[name] = sum(module.get_delta_weight(adapter).detach() for adapter in adapters)
    return found


def adapt_(model, seed, **fields):
    torch.manual_seed(seed)
    return add_adapter(model, FINEConfig(init_weights=False, r=3, **fields))


def load(pipe, folder, components):
    """With the stock loader."""
    pipe.load_lora_weights(folder, weight_name=FILE)
    if "transformer_2" in components:
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True)


@pytest.mark.parametrize("family", COMPONENTS)
def test_all_components_in_one_folder(family, tmp_path):
    """In whatever order they are written, and once more; each is loaded as it is."""
    components, ours = COMPONENTS[family], {}
    for turn, names in enumerate((components, components[::-1], components[:1])):
        pipe, stock = make(family), make(family)
        for place, name in enumerate(names):
            ours[name] = adapt_(getattr(pipe, name), 10 * turn + place)
            save_as_lora(ours[name], tmp_path, component=name, pipeline=pipe)
        load(stock, tmp_path, components)
        for name in components:
            expected, found = deltas(ours[name]), deltas(getattr(stock, name))
            assert expected.keys() == found.keys() and expected
            for key, delta in expected.items():
                torch.testing.assert_close(found[key], delta, rtol=1e-4, atol=1e-6)


MIXINS = {
    name: cls
    for name, cls in vars(lora_pipeline).items()
    if isinstance(cls, type) and issubclass(cls, LoraBaseMixin) and cls is not LoraBaseMixin
}
# Stock loaders that load no LoRA of their own components at all, whoever wrote it.
BROKEN = {"AmusedLoraLoaderMixin": "no pipeline has it; it inherits a loader that asks for a unet"}


@pytest.mark.parametrize("name", MIXINS)
def test_every_loader_reads_every_component(name, tmp_path):
    """Each of diffusers' loaders, over stand-ins for its components: what is written under a name is found there."""
    if name in BROKEN:
        pytest.skip(BROKEN[name])
    cls = MIXINS[name]
    components = [component for component in cls._lora_loadable_modules if not component.startswith("text_encoder")]
    parts = {component: wan_transformer() for component in components}
    nothing = {"components": {}, "hf_device_map": None, "text_encoder": None, "text_encoder_2": None}
    pipe = type("Pipe", (cls,), nothing | parts)()
    ours = {component: adapt_(wan_transformer(), place) for place, component in enumerate(components)}
    for component, model in ours.items():
        save_as_lora(model, tmp_path, component=component, pipeline=cls)
    load(pipe, tmp_path, components)
    for component, model in ours.items():
        expected, found = deltas(model), deltas(getattr(pipe, component))
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[key], delta, rtol=1e-4, atol=1e-6) for key, delta in expected.items())


@pytest.mark.parametrize(
    ("component", "pipe", "known"),
    [
        ("transfomer", None, "diffusers' pipelines load LoRAs into .*'transformer'"),
        ("text_encoder_3", None, "diffusers' pipelines"),
        ("", None, "diffusers' pipelines"),
        ("unet.down", None, "diffusers' pipelines"),
        ("text_encoder_2", FluxPipeline, r"FluxPipeline load LoRAs into \['transformer', 'text_encoder'\]"),
        ("transformer_2", SkyReelsV2Pipeline, r"SkyReelsV2Pipeline load LoRAs into \['transformer'\]"),
        ("transformer", AutoencoderKLWan, r"AutoencoderKLWan load LoRAs into \[\]"),
    ],
)
def test_components_that_nothing_loads(component, pipe, known, tmp_path):
    model = adapt_(MODELS["mlp"]().model, 0)
    with pytest.raises(ValueError, match=f"component={component!r}: {known}"):
        save_as_lora(model, tmp_path, component=component, pipeline=pipe)
    assert not list(tmp_path.iterdir())


def test_files_that_are_left_alone(tmp_path):
    """Damaged ones, and those whose LoRAs would be read with a config that is not theirs."""
    model, path = adapt_(MODELS["mlp"]().model, 0), tmp_path / FILE
    tensors = {"unet.up.lora_A.weight": torch.ones(1, 2)}
    for write, message in (
        (lambda: path.write_bytes(b"no such thing"), "is not a safetensors file"),
        (lambda: save_file(tensors, path), "holds LoRAs without a config, such as unet.up.lora_A.weight"),
        (lambda: save_file(tensors, path, {"lora_adapter_metadata": "[1]"}), "which is no JSON object"),
        (lambda: save_file(tensors, path, {"lora_adapter_metadata": "{"}), "is not a safetensors file with adapters"),
        (
            lambda: save_file({"lora_unet_up.alpha": torch.ones(1)}, path, {"lora_adapter_metadata": '{"unet.r": 1}'}),
            "such as lora_unet_up.alpha",
        ),
    ):
        write()
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            save_as_lora(model, tmp_path, component="transformer")
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_beside_diffusers_own(tmp_path):
    """A LoRA that diffusers wrote, with its config, goes on being what it is."""
    pipe, stock = pipeline("sd"), pipeline("sd")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    expected = deltas(pipe.text_encoder)
    adapter = {key.replace(".default.", "."): p for key, p in pipe.text_encoder.state_dict().items() if "lora_" in key}
    pipe.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=adapter,
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    save_as_lora(adapt_(pipe.unet, 0), tmp_path, component="unet", pipeline=pipe)
    stock.load_lora_weights(tmp_path)
    found = deltas(stock.text_encoder)
    assert found.keys() == expected.keys() and all(torch.allclose(found[key], expected[key]) for key in found)
    assert deltas(stock.unet).keys() == deltas(pipe.unet).keys()
    with safe_open(tmp_path / FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["text_encoder.lora_alpha"] == 6 and config["unet.r"] == 3
    assert {name.split(".")[0] for name in load_file(tmp_path / FILE)} == {"unet", "text_encoder"}
