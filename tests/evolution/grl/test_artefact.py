# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch

from artefacts import make_gene
from diffusers_learngene.evolution.grl import GeneConfig
from diffusers_learngene.evolution.grl.policy import ActorCritic


FULL = {
    "environment": "LearngeneAnt-v0",
    "tasks": ["step", "curve"],
    "training": {"population_size": 50, "seeds": [0, 1]},
}
SMALL = {"gene_type": [0], "shapes": {"0.weight": [2, 3], "0.bias": [2]}}


def test_inherit():
    gene = make_gene(**FULL)
    policy = ActorCritic(3, 1)
    assert gene.inherit_(policy) == []
    assert torch.equal(policy.std.weight, gene.tensors["5.std.weight"])
    assert len(gene.inherit_(ActorCritic(4, 1))) == 1  # the first layer's weights


@pytest.mark.parametrize("facts", [{}, FULL], ids=["bare", "full"])
def test_card(facts):
    card = make_gene(**facts).generate_model_card(repo_id="me/gene")
    assert "layers 0 and 5" in card.text and "- `5.std.bias`: 1" in card.text
    assert 'Gene.from_pretrained("me/gene")' in card.text
    assert card.data.pipeline_tag == "reinforcement-learning"


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
    ],
)
def test_what_no_config_may_say(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GeneConfig(**{**SMALL, **changes})
