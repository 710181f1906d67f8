# SPDX-License-Identifier: Apache-2.0
"""Which layers are adapted, which of them share, and what happens where none are."""

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import inspect_matched_modules
from torch import nn

from diffusers_learngene import WAVEConfig
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from diffusers_learngene.tuners.base_model import shared_groups
from models import MODELS, Block


def adapted(name, **fields):
    """Names of the layers that a config adapts in a tiny model."""
    model = get_peft_model(MODELS[name]().model, WAVEConfig(**fields))
    names = [
        key.removeprefix("base_model.model.") for key, m in model.named_modules() if isinstance(m, LearngeneLayer)
    ]
    assert set(names) == set(model.targeted_module_names) == set(inspect_matched_modules(model.base_model)["matched"])
    return names


def expect(*patterns, layers=range(3)):
    return [pattern.format(layer) for layer in layers for pattern in patterns]


BLOCK = [
    "transformer_blocks.{}.norm1.linear",
    "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
]
Q, UP = BLOCK[1], BLOCK[5]
TARGETS = [
    ({}, expect(*BLOCK)),
    ({"target_modules": ["to_q", "net.0.proj"]}, expect(Q, UP)),
    ({"target_modules": ["transformer_blocks.1.attn1.to_q"]}, expect(Q, layers=[1])),
    ({"target_modules": r".*\.[02]\.attn1\.to_q"}, expect(Q, layers=[0, 2])),
    ({"exclude_modules": ["norm1.linear", "to_k", "to_v", "to_out.0", "ff.net.2"]}, expect(Q, UP)),
    ({"exclude_modules": r".*(norm1|ff|to_[kvo]).*"}, expect(Q)),
    # PEFT's rule finds none of these: the list of blocks lies at the root of the model
    ({"layers_to_transform": 1}, expect(*BLOCK, layers=[1])),
    ({"layers_to_transform": [0, 2], "target_modules": ["to_q"]}, expect(Q, layers=[0, 2])),
    ({"layers_to_transform": [2], "layers_pattern": "transformer_blocks"}, expect(*BLOCK, layers=[2])),
    ({"layers_to_transform": [2], "layers_pattern": ["x", "transformer_blocks"]}, expect(*BLOCK, layers=[2])),
    ({"layers_to_transform": [1], "target_modules": [Q.format(0), Q.format(1)]}, expect(Q, layers=[1])),
]


@pytest.mark.parametrize(("fields", "names"), TARGETS, ids=lambda value: str(value)[:60])
def test_targets(fields, names):
    assert adapted("dit", **fields) == names


def test_all_linear():
    """As in PEFT: every linear layer but the output embedding, in a stack or not."""
    names = adapted("dit", target_modules="all-linear")
    assert {*expect(*BLOCK), "proj_out_1", "proj_out_2"} <= set(names) and len(names) == 3 * 9 + 2
    assert adapted("gpt2", target_modules="all-linear") == adapted("gpt2")
    every = adapted("dit", target_modules="all-linear", layers_to_transform=1)
    assert {name.split(".")[1] for name in every} == {"1"}


@pytest.mark.parametrize("name", ["llama", "vit", "t5", "flux", "lumina2"])
def test_layers_to_transform_counts_the_blocks_of_any_model(name):
    names = adapted(name, layers_to_transform=[1])
    assert names and set(names) == {key for key in adapted(name) if ".1." in key.replace("layer.1.", "")}


def test_default_targets_survive_an_adapter_and_a_saved_module():
    config = {"modules_to_save": ["norm1.linear"], "exclude_modules": ["to_q"]}
    model = get_peft_model(MODELS["dit"]().model, WAVEConfig(**config))
    model.add_adapter("second", WAVEConfig())
    names = {key.removeprefix("base_model.model.") for key in shared_layers(model, "second")}
    assert names == {name for name in expect(*BLOCK) if "norm1" not in name}


class Reader(Block):
    """Reads a weight past its layer, as fused attention and state space models do."""

    def forward(self, x):
        return x + torch.tanh(self.up(self.norm(x))) @ self.down.weight.T


def test_what_is_read_without_being_called_is_no_default():
    model = nn.Module()
    model.blocks = nn.ModuleList(Reader(nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)) for _ in range(2))
    assert set(shared_layers(get_peft_model(model, WAVEConfig()))) == {
        f"base_model.model.blocks.{layer}.up" for layer in range(2)
    }


def shared_layers(model, adapter="default"):
    return [name for group in shared_groups(model, adapter).values() for name in group.layers]


def test_who_shares():
    """One bank a role and shape; q, k and v join; the last block of SD3 has another modulation."""
    groups = shared_groups(get_peft_model(MODELS["sd3"]().model, WAVEConfig()))
    assert {key: len(group.layers) for key, group in groups.items()} == {
        "transformer_blocks.*.norm1.linear": 3,
        "transformer_blocks.*.norm1_context.linear": 2,
        "transformer_blocks.*.attn.to_q+to_k+to_v": 9,
        "transformer_blocks.*.attn.add_k_proj+add_v_proj+add_q_proj": 9,
        "transformer_blocks.*.attn.to_out.0": 3,
        "transformer_blocks.*.attn.to_add_out": 2,
        "transformer_blocks.*.ff.net.0.proj": 3,
        "transformer_blocks.*.ff.net.2": 3,
        "transformer_blocks.*.ff_context.net.0.proj": 2,
        "transformer_blocks.*.ff_context.net.2": 2,
    }
    apart = shared_groups(get_peft_model(MODELS["llama"]().model, WAVEConfig(share_qkv=False)))
    assert {len(group.layers) for group in apart.values()} == {3} and len(apart) == 7


def test_a_layer_outside_the_stacks_has_a_bank_of_its_own():
    groups = shared_groups(get_peft_model(MODELS["mlp"]().model, WAVEConfig(target_modules=["up", "head"])))
    assert {key: len(group.layers) for key, group in groups.items()} == {"blocks.*.up": 3, "head": 1}


def test_layers_of_a_file(method, tmp_path):
    """PEFT can take the targets from a file, which does not name layers that own nothing: then the config says."""
    tiny = MODELS["dit"]()
    tiny.model = get_peft_model(tiny.model, method())
    state = get_peft_model_state_dict(tiny.model)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    other = MODELS["dit"]()
    inject_adapter_in_model(method(), other.model, state_dict=state)
    set_peft_model_state_dict(other.model, state)
    torch.testing.assert_close(other(), tiny(), rtol=1e-4, atol=1e-5)


def test_modules_to_save(method, tmp_path):
    tiny = MODELS["dit"]()
    tiny.model = get_peft_model(tiny.model, method(modules_to_save=["proj_out_2"]))
    assert tiny.model.proj_out_2.modules_to_save.default.weight.requires_grad
    with torch.no_grad():
        tiny.model.proj_out_2.modules_to_save.default.weight.add_(1)
    tiny.model.save_pretrained(tmp_path)
    other = MODELS["dit"]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path)
    assert torch.equal(other(), tiny())


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("learngene_only", 6), ("all", 6 + 3 + 1)])
def test_bias(bias, trained, tmp_path):
    tiny = MODELS["mlp"]()
    tiny.model = get_peft_model(tiny.model, WAVEConfig(bias=bias, init_weights=False))
    names = [name for name, p in tiny.model.named_parameters() if p.requires_grad and "learngene_" not in name]
    assert len(names) == trained and all(name.endswith("bias") for name in names)
    with torch.no_grad():
        for name in names:
            tiny.model.get_parameter(name).add_(1)
    tiny.model.save_pretrained(tmp_path)
    other = MODELS["mlp"]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path)
    assert torch.equal(other(), tiny())


NOTHING = [
    ("dit", {"target_modules": ["nowhere"]}, "nowhere.* not found in the base model"),
    ("dit", {"layers_to_transform": [7]}, "layers_to_transform.*7"),
    ("dit", {"exclude_modules": r".*"}, "All modules were excluded"),
    ("dit", {"target_modules": ["ff"]}, r"transformer_blocks\.0\.ff \(FeedForward\) is not supported"),
    ("vit", {"target_modules": ["projection"]}, r"projection \(Conv2d\) is not supported.* 1x1 kernels"),
    ("mlp", {"target_modules": ["norm"]}, r"norm \(LayerNorm\) is not supported"),
]


@pytest.mark.parametrize(("name", "fields", "message"), NOTHING, ids=lambda value: str(value)[:40])
def test_nothing_to_adapt(name, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(MODELS[name]().model, WAVEConfig(**fields))


def test_model_without_repeated_blocks():
    with pytest.raises(ValueError, match="no repeated blocks.* Name the layers to adapt in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), WAVEConfig())
    assert get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), WAVEConfig(target_modules=["0"]))


def fuse_(model):
    """Whether a model can, and does."""
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    return any(getattr(module, "fused_projections", False) for module in model.modules())


@pytest.mark.parametrize("name", [name for name in MODELS if fuse_(MODELS[name]().model)])
def test_fused_projections(name):
    """diffusers reads the fused copy: an adapter of q, k or v would do nothing at all. And the other way, later."""
    tiny, plain = MODELS[name](), MODELS[name]()()
    fuse_(tiny.model)
    torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-5)
    fused = {key.rpartition(".")[2] for key, _ in tiny.model.named_modules()} & {"to_qkv", "to_added_qkv", "to_kv"}
    before = set(tiny.model.state_dict())
    for fields in ({}, {"target_modules": ["to_v"]}):
        with pytest.raises(ValueError, match="is not read, because the projections of .* are fused: call unfuse_qkv"):
            get_peft_model(tiny.model, WAVEConfig(**fields))
        assert set(tiny.model.state_dict()) == before
    tiny.model = get_peft_model(tiny.model, WAVEConfig(target_modules=[*fused], init_weights=False))
    assert fused and not torch.allclose(tiny(), plain, atol=1e-4)
    tiny.model = tiny.model.unload()
    tiny.model.unfuse_qkv_projections()
    if any(key.endswith("to_qkv.weight") for key in tiny.model.state_dict()):
        with pytest.raises(ValueError, match="to_.*kv is not read, because .* were fused: .* load the model again"):
            get_peft_model(tiny.model, WAVEConfig())
    tiny.model = get_peft_model(tiny.model, WAVEConfig(target_modules=["to_v"], init_weights=False))
    assert not torch.allclose(tiny(), plain, atol=1e-4)
