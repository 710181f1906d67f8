# SPDX-License-Identifier: Apache-2.0
import json
import re
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from diffusers_learngene.evolution.grl import Gene, GeneConfig, GeneError
from diffusers_learngene.evolution.grl.genes import tensors_of
from diffusers_learngene.evolution.grl.network import Network
from diffusers_learngene.evolution.grl.policy import ActorCritic


FULL = {
    "environment": "LearngeneAnt-v0",
    "tasks": ["step", "curve"],
    "training": {"population_size": 50, "seeds": [0, 1]},
}
SMALL = {"gene_type": [0], "shapes": {"0.weight": [2, 3], "0.bias": [2]}}


def make_gene(gene_type=(0, 5), **facts):
    arrays = tensors_of(Network(3, 1, seed=0).actor(), gene_type)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Gene(GeneConfig(list(gene_type), shapes, **facts), tensors)


def assert_same(one, other):
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_save_read_and_inherit(tmp_path):
    one = make_gene(**FULL)
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gene.safetensors", "config.json", "README.md"}
    again = Gene.from_pretrained(tmp_path)
    assert_same(one, again)
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(one.config)
    policy = ActorCritic(3, 1)
    assert again.inherit_(policy) == []
    assert torch.equal(policy.std.weight, one.tensors["5.std.weight"])
    assert len(again.inherit_(ActorCritic(4, 1))) == 1  # the first layer's weights


def test_push_and_fetch(hub, tmp_path):
    one = make_gene(**FULL)
    (tmp_path / "lineage.png").write_bytes(b"\x89PNG")
    one.card = {"images": [tmp_path / "lineage.png"]}
    one.push_to_hub("me/gene")
    assert set(hub.files("me/gene")) - {".gitattributes"} == {
        *("gene.safetensors", "config.json", "README.md", "lineage.png")
    }
    assert_same(one, Gene.from_pretrained("me/gene"))
    with hub.down():
        assert_same(one, Gene.from_pretrained("me/gene"))
    card = ModelCard(hub.files("me/gene")["README.md"].decode())
    assert 'Gene.from_pretrained("me/gene")' in card.text and "![lineage.png](lineage.png)" in card.text


@pytest.mark.parametrize("facts", [{}, FULL], ids=["bare", "full"])
@pytest.mark.parametrize("card", [{}, {"results": [{"a|b": 1, "c": 2}], "commit": "0123"}], ids=["bare", "results"])
def test_card(facts, card):
    one = make_gene(**facts)
    one.card = card
    text = one.generate_model_card()
    assert "layers 0 and 5" in text.text and "- `5.std.bias`: 1" in text.text
    assert text.data.pipeline_tag == "reinforcement-learning"
    assert not any(mark in text.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    assert all(line == line.rstrip() for line in text.content.splitlines())
    for code in text.text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gene_type": []}, "gene_type=[] must be a list of layers"),
        ({"gene_type": [5, 0]}, "gene_type=[5, 0] must be a list of layers, each once, in order"),
        ({"gene_type": [True]}, "gene_type=[True]"),
        ({"gene_type": [-1]}, "gene_type=[-1]"),
        ({"gene_type": [0, 1]}, "lacks tensors of the layers [1]"),
        ({"shapes": {}}, "shapes={} must hold 1 to 64 shapes"),
        ({"shapes": {"../x": [1]}}, "shapes: '../x' is not a tensor of the layers [0]"),
        ({"shapes": {"1.weight": [2, 3]}}, "shapes: '1.weight' is not a tensor of the layers [0]"),
        ({"shapes": {"0.weight": [2]}}, "shapes['0.weight']=[2] must be 2 numbers"),
        ({"shapes": {"0.bias": [10**9]}}, "shapes['0.bias']=[1000000000] must be 1 numbers from 1 to 65536"),
        ({"shapes": {"00.weight": [2, 3]}}, "shapes: '00.weight' is not a tensor of the layers [0]"),
        ({"shapes": {"0.weight": [2, 3]}}, "shapes: 0 has {'weight': [2, 3]}, not weights and as many biases"),
        ({"shapes": {"0.weight": [2, 3], "0.bias": [3]}}, "shapes: 0 has {'weight': [2, 3], 'bias': [3]}, not"),
        ({"environment": 3}, "environment=3 must be a name or null"),
        ({"tasks": [1]}, "tasks=[1] must be a list of words"),
        ({"tasks": "step"}, "tasks='step' must be"),
        ({"training": {"a": [{}]}}, "training['a']=[{}] must be a number"),
        ({"training": {"a": float("nan")}}, "training['a']=nan must be a number"),
        ({"format_version": 2}, "format_version=2 is not 1: update"),
        ({"format_version": True}, "format_version=True is not 1"),
    ],
)
def test_what_no_config_may_say(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GeneConfig(**{**SMALL, **changes})


def description(**changes):
    return {"gene": json.dumps(asdict(GeneConfig(**SMALL)) | changes)}


@pytest.mark.parametrize(
    "metadata, changes, message",
    [
        (None, {}, "without the description of a gene"),
        ({"gene": "[1]"}, {}, "the description of a GeneConfig lacks"),
        ({"gene": "{"}, {}, "not a gene that can be used"),
        (description(extra=1), {}, "has {'extra'}"),
        (description(), {"0.weight": torch.ones(3, 3)}, "it holds {"),
        (description(), {"1.bias": torch.ones(1)}, "it holds {"),
        (description(), {"0.bias": torch.ones(2, dtype=torch.int8)}, "is torch.int8, which is no floating-point type"),
        (description(), {"0.bias": torch.full((2,), torch.nan)}, "0.bias holds NaN or infinity"),
    ],
)
def test_damaged_files(tmp_path, metadata, changes, message):
    tensors = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), **changes}
    save_file(tensors, tmp_path / "gene.safetensors", metadata=metadata)
    with pytest.raises(GeneError, match=re.escape(message)):
        Gene.from_pretrained(tmp_path)


def test_what_is_no_artefact(tmp_path):
    torch.save({"0.bias": torch.ones(2)}, tmp_path / "gene.bin")
    with pytest.raises(GeneError, match=r"holds no gene.safetensors: not a Gene \(pickles are never read\)"):
        Gene.from_pretrained(tmp_path)
    make_gene().save_pretrained(tmp_path)
    with open(tmp_path / "gene.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(GeneError, match="cannot be read as safetensors"):
        Gene.from_pretrained(tmp_path)
