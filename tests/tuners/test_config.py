# SPDX-License-Identifier: Apache-2.0
"""Configs: refused before anything is allocated, and the same after a trip through JSON."""

import re
from dataclasses import fields
from inspect import getdoc

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from diffusers_learngene import FINEConfig, KINDConfig, WAVEConfig
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.tuners.base_config import LearngeneConfig
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
    ({"tensors_to_save": "head.bias"}, "tensors_to_save='head.bias'"),
    ({"freeze_bank": 1}, "freeze_bank=1"),
    ({"target_modules": "(up"}, r"target_modules='\(up' is no regular expression: missing \)"),
    ({"exclude_modules": "*up"}, r"exclude_modules='\*up' is no regular expression"),
    ({"layers_pattern": ["[a"], "layers_to_transform": 1}, r"layers_pattern='\[a' is no regular expression"),
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


WRONG_KIND = [
    ({"num_learngene": -1}, "num_learngene=-1 must be a whole number"),
    ({"num_learngene": True}, "num_learngene=True"),
    ({"num_learngene": 8.0}, "num_learngene=8.0"),
    ({"num_learngene": 10**12}, "num_learngene=1000000000000"),
    ({"tailors_per_class": 0}, "tailors_per_class=0"),
    ({"tailors_per_class": "1"}, "tailors_per_class='1'"),
    ({"num_classes": -1}, "num_classes=-1"),
    ({"num_classes": None, "class_groups": [[10**12]]}, r"class_groups\[0\]=1000000000000"),
    ({"num_classes": 10**6}, "The gate matrix of num_classes.* asks for a tensor of 1000001000000 numbers"),
    ({"class_groups": []}, r"class_groups=\[\] must be lists of classes"),
    ({"class_groups": 3}, "class_groups=3 must be lists of classes"),
    ({"class_groups": [3]}, r"class_groups\[0\]=3 must be a list of classes"),
    ({"class_groups": [[0], []]}, r"class_groups\[1\]=\[\] must be a list of classes"),
    ({"class_groups": [[0, -1]]}, r"class_groups\[0\]=-1"),
    ({"class_groups": [[0, True]]}, r"class_groups\[0\]=True"),
    ({"class_groups": {"a": [0, 0]}}, r"class_groups\['a'\]=\[0, 0\] holds a class twice"),
    ({"class_groups": {1: [0]}}, "class_groups={1: \\[0\\]} must be lists of classes, or map names"),
    ({"class_groups": {"a": [0, 5]}, "num_classes": 5}, r"class_groups\['a'\]=5 must be .* between 0 and 4"),
    ({"class_groups": [[0]], "num_classes": 0}, r"class_groups\[0\]=0"),
    ({"class_gate": []}, r"class_gate=\[\] must be a row of zeros and ones"),
    ({"class_gate": [1, 0]}, "class_gate=.* must be a row of zeros and ones"),
    ({"class_gate": [[]]}, r"rows of \[0\] tailors"),
    ({"class_gate": [[1], [1, 0]]}, r"rows of \[1, 2\] tailors"),
    ({"class_gate": [[1], [2]]}, r"class_gate\[1\]=2"),
    ({"class_gate": [[1], [True]]}, r"class_gate\[1\]=True"),
    ({"class_gate": [[1]], "tailors_per_class": 1}, "class_gate says all of it"),
    ({"class_gate": [[1]], "class_groups": [[0]]}, "class_gate says all of it"),
    ({"class_gate": [[1], [0]], "num_classes": 3}, "class_gate has 2 rows, but num_classes=3"),
    ({"known_classes": 3}, "known_classes=3 must be a list of classes"),
    ({"known_classes": [7], "num_classes": 7}, "known_classes=7"),
    ({"group_sizes": [1, 2]}, "group_sizes=\\[1, 2\\] must map groups"),
    ({"group_sizes": {"a": 1}}, r"group_sizes\['a'\]=1 must be \[learngenes, tailors\]"),
    ({"group_sizes": {"a": [1, -1]}}, r"group_sizes\['a'\]=-1"),
    *(case for case in WRONG if not any("template" in field for field in case[0])),
]


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"),
    [(WAVEConfig, *case) for case in WRONG]
    + [(FINEConfig, *case) for case in WRONG_FINE]
    + [(KINDConfig, *case) for case in WRONG_KIND],
    ids=lambda value: str(value)[:60],
)
def test_wrong_fields_are_named(config_cls, fields, message):
    with pytest.raises(ValueError, match=message):
        config_cls(**fields)


COMMON = [
    {},
    {"target_modules": "all-linear", "layers_to_transform": [0, 2], "layers_pattern": ["blocks"]},
    {"target_modules": r".*\.up", "modules_to_save": ["head"], "bias": "learngene_only", "share_qkv": False},
    {"tensors_to_save": ["blocks.*.norm.weight"], "freeze_bank": True},
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


RIGHT_KIND = [
    {"mode": "generate", "num_learngene": 0, "tailors_per_class": 3, "num_classes": 7},
    {"class_groups": [[0, 3], (1, 3)], "known_classes": [0, 1, 2], "group_sizes": {"a.*.b": (2, 4)}},
    {"class_groups": {"b": [1], "a": [5, 2]}, "num_classes": 6},
    {"class_gate": [[0, 1], (1, 1), [0, 0]], "target_modules": ["b", "a"]},
]


@pytest.mark.parametrize(
    "config",
    [WAVEConfig(**fields) for fields in COMMON + RIGHT]
    + [FINEConfig(**fields) for fields in COMMON + RIGHT_FINE]
    + [KINDConfig(**fields) for fields in COMMON + RIGHT_KIND],
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
    groups = Anatomy.of(model).groups_of([name.format(layer) for layer in range(3) for name in (q, k, v, ff)])
    sizes = [WAVEConfig(mode=mode).size_of(group) for group in groups]
    assert sizes == ([(8, 8, 8), (8, 8, 8)] if mode == "add" else [(24, 8, 8), (32, 8, 8)])
    assert [FINEConfig(mode=mode).size_of(group) for group in groups] == [(16,), (16,)]
    (alone,) = Anatomy.of(model).groups_of(["proj_out_2"])
    assert WAVEConfig(mode=mode).size_of(alone) == ((4, 8, 8))


def test_default_rank():
    """The smaller side, and in add mode no more than 64."""
    model = nn.ModuleDict({"a": nn.Linear(100, 300), "b": nn.Linear(300, 50)})
    groups = Anatomy.of(model).groups_of(model)
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


# KIND


def test_kind_sizes():
    """Add: 8 and 1 a class. Generate: half the smaller side and a 64th. A pattern counts all tailors of a group."""
    model = nn.ModuleDict({"a": nn.Linear(256, 300), "b": nn.Linear(300, 6)})
    groups = Anatomy.of(model).groups_of(model)
    sizes = {mode: [KINDConfig(mode=mode, num_classes=3).size_of(g) for g in groups] for mode in ("add", "generate")}
    assert sizes == {"add": [(8, 3), (6, 3)], "generate": [(128, 12), (3, 3)]}
    assert [KINDConfig(num_classes=0).size_of(g) for g in groups] == [(8, 0), (6, 0)]
    grouped = KINDConfig(num_classes=3, class_groups=[[0], [1, 2]], tailors_per_class=5, group_sizes={"b": [99, 4]})
    assert [grouped.size_of(g) for g in groups] == [(8, 10), (99, 4)]
    assert [KINDConfig(class_gate=[[1, 0, 1], [0, 0, 0]]).size_of(g) for g in groups] == [(8, 3), (6, 3)]


def test_kind_gate_matrix():
    """Rows are classes and the null class; who is in no group is not known, unless it is said."""
    groups = {"odd": [1, 3], "low": [0, 1]}
    matrix, known = KINDConfig(num_classes=5, class_groups=groups).gate_matrix()
    assert matrix.int().tolist() == [[0, 1], [1, 1], [0, 0], [1, 0], [0, 0], [0, 0]]
    assert known.tolist() == [True, True, False, True, False, True]
    _, known = KINDConfig(num_classes=5, class_groups=groups, known_classes=[4, 1]).gate_matrix()
    assert known.tolist() == [False, True, False, False, True, True]
    matrix, known = KINDConfig(num_classes=2).gate_matrix()
    assert matrix.int().tolist() == [[1, 0], [0, 1], [0, 0]] and known.all()
    matrix, known = KINDConfig(class_gate=[[0, 0, 0], [1, 0, 1]]).gate_matrix()
    assert matrix.int().tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]] and known.all()
    with pytest.raises(ValueError, match="num_classes is not given, and no model has been asked"):
        KINDConfig().gate_matrix()


def test_kind_classes_of_the_model():
    """A DiT says how many there are, and the config keeps it; a class that it lacks is refused."""
    config = KINDConfig(class_groups=[[1], [9]])
    get_peft_model(MODELS["dit"]().model, config)
    assert config.num_classes == 10
    unchanged(MODELS["dit"], KINDConfig(class_groups=[[1], [10]]), r"class_groups\[1\]=10 must be .* between 0 and 9")
    unchanged(
        MODELS["mlp"], KINDConfig(), "num_classes is not given, and the model's config has no num_embeds_ada_norm"
    )


def test_kind_sizes_that_do_not_fit():
    wide = KINDConfig(num_classes=2, num_learngene=21)
    unchanged(MODELS["mlp"], wide, "num_learngene=21 is more than the smaller side of the 28 x 20 weight of blocks")
    uneven = KINDConfig(num_classes=2, group_sizes={"blocks.*.up": [1, 3]})
    unchanged(MODELS["mlp"], uneven, "3 tailors of blocks.*up cannot be shared out among 2 classes")
    without = KINDConfig(num_classes=0, group_sizes={"blocks.*.up": [1, 3]})
    unchanged(MODELS["mlp"], without, "3 tailors of blocks.*up cannot be shared out among 0 classes")
    unchanged(MODELS["mlp"], KINDConfig(num_classes=0, num_learngene=0), "has neither learngenes nor tailors")
    huge = KINDConfig(mode="generate", num_classes=2, tailors_per_class=10**9)
    unchanged(MODELS["mlp"], huge, "A factor of blocks.* asks for a tensor")
    unchanged(MODELS["mlp"], KINDConfig(num_classes=0, group_sizes={"x": [1, 0]}), r"group_sizes names the groups")


@pytest.mark.parametrize("kind", [LearngeneConfig, WAVEConfig, FINEConfig, KINDConfig])
def test_the_docstring_lists_every_field_once(kind):
    listed = re.search(r"Args:\n((?:  .*\n)+)", getdoc(kind))[1]
    own = [field.name for field in fields(kind) if field.name not in {field.name for field in fields(PeftConfig)}]
    assert sorted(re.findall(r"^    (\w+): ", listed, re.MULTILINE)) == sorted(own)
