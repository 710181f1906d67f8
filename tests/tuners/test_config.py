# SPDX-License-Identifier: Apache-2.0
"""Configs: refused before anything is allocated, and the same after a trip through JSON."""

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from diffusers_learngene import FINEConfig, WAVEConfig
from diffusers_learngene.blocks import group_modules
from models import MODELS


WRONG = [
    ({"num_templates": 0}, "num_templates=0"),
    ({"num_templates": -4}, "num_templates=-4"),
    ({"num_templates": True}, "num_templates=True"),
    ({"num_templates": 2.0}, "num_templates=2.0"),
    ({"num_templates": "4"}, "num_templates='4'"),
    ({"num_templates": 10**12}, "num_templates=1000000000000"),
    ({"template_size": 0}, "template_size=0"),
    ({"template_size": -1}, "template_size=-1"),
    ({"template_size": False}, "template_size=False"),
    ({"template_size": 8.0}, "template_size=8.0"),
    ({"template_size": "8"}, "template_size='8'"),
    ({"template_size": [8]}, r"template_size=\[8\]"),
    ({"template_size": [8, 8, 8]}, r"template_size=\[8, 8, 8\]"),
    ({"template_size": [8, -8]}, "template_size=-8"),
    ({"template_size": [10**6, 10**6]}, "asks for a tensor of 1000000000000 numbers"),
    ({"num_templates": 10**6, "template_size": 1000}, "asks for a tensor of 1000000000000 numbers"),
    ({"template_pattern": [1, 2, 3]}, "template_pattern"),
    ({"template_pattern": {"a": [1, 2]}}, r"template_pattern\['a'\]"),
    ({"template_pattern": {"a": [1, 2, 0]}}, r"template_pattern\['a'\]"),
    ({"template_pattern": {"a": "123"}}, r"template_pattern\['a'\]"),
    ({"template_pattern": {"a": [10**5, 10**5, 10**5]}}, "asks for a tensor"),
    ({"template_pattern": {1: [1, 2, 3]}}, "template_pattern"),
    ({"mode": "replace"}, "mode='replace' must be one of 'add', 'generate'"),
    ({"mode": None}, "mode=None"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"share_qkv": 1}, "share_qkv=1"),
    ({"init_weights": "yes"}, "init_weights='yes'"),
    ({"inference_mode": 1}, "inference_mode=1"),
    ({"target_modules": 3}, "target_modules=3"),
    ({"target_modules": ["a", 3]}, "target_modules"),
    ({"target_modules": "a" * 5000}, "target_modules holds a string of 5000"),
    ({"exclude_modules": ["a" * 5000]}, "exclude_modules holds a string of 5000"),
    ({"modules_to_save": "head"}, "modules_to_save='head'"),
    ({"layers_to_transform": -1}, "layers_to_transform=-1"),
    ({"layers_to_transform": [0, True]}, "layers_to_transform=True"),
    ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
    ({"layers_pattern": "blocks"}, "give layers_to_transform as well"),
    ({"layers_to_transform": 1, "target_modules": ".*up"}, "has no effect on a regular expression"),
]


WRONG_FINE = [
    ({"r": 0}, "r=0 must be a whole number"),
    ({"r": -1}, "r=-1"),
    ({"r": True}, "r=True"),
    ({"r": 4.0}, "r=4.0"),
    ({"r": "4"}, "r='4'"),
    ({"r": 10**12}, "r=1000000000000"),
    ({"group_ranks": [4]}, "group_ranks=\\[4\\] must map groups to ranks"),
    ({"group_ranks": {1: 4}}, "group_ranks"),
    ({"group_ranks": {"a": 0}}, r"group_ranks\['a'\]=0"),
    ({"group_ranks": {"a": [4]}}, r"group_ranks\['a'\]=\[4\]"),
    ({"group_ranks": {"a": None}}, r"group_ranks\['a'\]=None"),
    *(case for case in WRONG if not any("template" in field for field in case[0])),
]


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"),
    [(WAVEConfig, *case) for case in WRONG] + [(FINEConfig, *case) for case in WRONG_FINE],
    ids=lambda value: str(value)[:60],
)
def test_wrong_fields_are_named(config_cls, fields, message):
    with pytest.raises(ValueError, match=message):
        config_cls(**fields)


COMMON = [
    {},
    {"target_modules": "all-linear", "layers_to_transform": [0, 2], "layers_pattern": ["blocks"]},
    {"target_modules": r".*\.up", "modules_to_save": ["head"], "bias": "learngene_only", "share_qkv": False},
    {"layers_to_transform": 1, "exclude_modules": "x.*", "init_weights": False, "inference_mode": True},
]
RIGHT = [
    {"mode": "generate", "template_pattern": {"blocks.*.up": [3, 4, 5], "b": (1, 1, 1)}},
    {"num_templates": 3, "template_size": (4, 5), "target_modules": ["b", "a", "a"], "exclude_modules": ["c"]},
    {"template_size": 7},
]
RIGHT_FINE = [
    {"mode": "generate", "group_ranks": {"blocks.*.up": 3, "b": 4000}},
    {"r": 3, "target_modules": ["b", "a", "a"], "exclude_modules": ["c"]},
]


@pytest.mark.parametrize(
    "config",
    [WAVEConfig(**fields) for fields in COMMON + RIGHT] + [FINEConfig(**fields) for fields in COMMON + RIGHT_FINE],
    ids=lambda config: str(config)[:60],
)
def test_json_round_trip_is_exact(config, tmp_path):
    config.save_pretrained(str(tmp_path))
    first = (tmp_path / "adapter_config.json").read_bytes()
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is type(config) and loaded == config
    loaded.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_config.json").read_bytes() == first


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_default_sizes(mode):
    """Add: 8 templates of half the smallest side, fewer where there are fewer tiles. Generate: two layers' worth."""
    model = MODELS["dit"]().model
    q, k, v, ff = (
        f"transformer_blocks.{{}}.{role}" for role in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.2")
    )
    groups = group_modules(model, [name.format(layer) for layer in range(3) for name in (q, k, v, ff)])
    sizes = [WAVEConfig(mode=mode).size_of(group) for group in groups]
    assert sizes == ([(8, 8, 8), (8, 8, 8)] if mode == "add" else [(24, 8, 8), (32, 8, 8)])
    assert [FINEConfig(mode=mode).size_of(group) for group in groups] == [(16,), (16,)]
    (alone,) = group_modules(model, ["proj_out_2"])
    assert WAVEConfig(mode=mode).size_of(alone) == ((4, 8, 8))


def test_default_rank():
    """The smaller side, and in add mode no more than 64."""
    model = nn.ModuleDict({"a": nn.Linear(100, 300), "b": nn.Linear(300, 50)})
    groups = group_modules(model, model)
    assert [FINEConfig().size_of(group) for group in groups] == [(64,), (50,)]
    assert [FINEConfig(mode="generate").size_of(group) for group in groups] == [(100,), (50,)]


def unchanged(make, config, message):
    """The config is refused with this message, and the model is as it was."""
    tiny = make()
    names = dict(tiny.model.named_parameters())
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.model, config)
    assert dict(tiny.model.named_parameters()) == names
    assert all(parameter.requires_grad for parameter in names.values())


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_templates_larger_than_the_matrix(mode):
    message = r"21 x 4 is larger than the 20 x 28 weight of blocks\.0\.down"
    unchanged(MODELS["mlp"], WAVEConfig(mode=mode, template_size=(21, 4)), message)


def test_dependent_templates():
    unchanged(MODELS["mlp"], WAVEConfig(num_templates=5, template_size=2), "5 templates of 2 x 2 for blocks")


def test_pattern_sets_the_sizes_of_its_groups():
    pattern = {"blocks.*.up": [3, 7, 5]}
    model = get_peft_model(MODELS["mlp"]().model, WAVEConfig(template_pattern=pattern, template_size=4))
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if "templates" in name}
    assert shapes == {(3, 7, 5), (8, 4, 4)}


def test_pattern_may_crop_in_generate_mode_only():
    pattern = {"blocks.*.up": [3, 40, 40]}
    assert get_peft_model(MODELS["mlp"]().model, WAVEConfig(mode="generate", template_pattern=pattern))
    unchanged(MODELS["mlp"], WAVEConfig(template_pattern=pattern), "40 x 40 is larger")


def test_pattern_with_an_unknown_group():
    message = r"names the groups \['up'\], but this model has \['blocks\.\*\.up', 'blocks\.\*\.down'\]"
    unchanged(MODELS["mlp"], WAVEConfig(template_pattern={"up": [1, 2, 3]}), message)


def test_ranks_beyond_the_smaller_side():
    """In add mode an error, unless it is said of the very group; in generate mode a dictionary of r matrices."""
    unchanged(MODELS["mlp"], FINEConfig(r=21), r"r=21 is more than the smaller side of the 28 x 20 weight of blocks")
    pattern = {"blocks.*.up": 50}
    for config in (FINEConfig(group_ranks=pattern), FINEConfig(mode="generate", group_ranks=pattern, r=50)):
        model = get_peft_model(MODELS["mlp"]().model, config)
        assert model.base_model.model.blocks[2].up.bank("default").u.shape == (28, 50)
    for mode in ("add", "generate"):
        too_many = FINEConfig(mode=mode, group_ranks={"blocks.*.up": 561})
        unchanged(MODELS["mlp"], too_many, "r=561 components of 28 x 20 .* cannot be independent: lower it to 560")


def test_a_rank_that_memory_has_not():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(100_000, 100_000)})
    with pytest.raises(ValueError, match="A factor of a=.* asks for a tensor"):
        get_peft_model(model, FINEConfig(mode="generate", target_modules=["a"]))


def test_group_ranks_with_an_unknown_group():
    unchanged(MODELS["mlp"], FINEConfig(group_ranks={"up": 2}), r"group_ranks names the groups \['up'\]")
