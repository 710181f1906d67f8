# SPDX-License-Identifier: Apache-2.0
"""A model is read once, handed on, and can be printed."""

from collections import Counter

import pytest
from torch import nn

from ancestries import ARCHITECTURES, ancestry, depth
from diffusers_learngene import FINEConfig, Learngene, WAVEConfig
from diffusers_learngene.anatomy import Anatomy, handed_on
from diffusers_learngene.anatomy import anatomy as module
from diffusers_learngene.anatomy import kinds as kinds_module
from diffusers_learngene.learngene import learngene as artefact
from models import MODELS


@pytest.fixture
def readings(monkeypatch):
    """How often the stacks, the tensors and one block of each kind of each model were read, by model or block."""
    counts = {name: Counter() for name in ("find_stacks", "tensors_of", "trace")}
    kept = []  # or an id would come again

    def counting(name, function):
        def counted(read):
            kept.append(read)
            counts[name][id(read)] += 1
            return function(read)

        return counted

    for name in counts:
        for owner in (module, kinds_module, artefact):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return counts


@pytest.mark.parametrize("config_cls", [WAVEConfig, FINEConfig])
@pytest.mark.parametrize("name", ["dit", "flux", "vit"])
def test_a_model_is_read_once(name, config_cls, readings):
    model = ancestry(name).model
    learngene = Learngene.condense(model, config_cls(mode="generate"))
    kinds = len(Anatomy(model).blocks)  # reads it once more
    blocks = [id(block) for stack in Anatomy(model).stacks.values() for block in stack.children()]
    assert readings["find_stacks"] == {id(model): 3}  # 2 of them just now
    assert readings["tensors_of"][id(model)] == 1 and sum(readings["tensors_of"].values()) == 2  # and its config's
    assert sum(readings["trace"].values()) == 2 * kinds and readings["trace"].keys() <= set(blocks)

    for counts in readings.values():
        counts.clear()
    target = learngene.descend(**depth(name, 4)).get_base_model()
    assert readings["find_stacks"] == readings["tensors_of"] == {id(target): 1}
    assert set(readings["trace"].values()) == {1} and len(readings["trace"]) == kinds


def test_a_reading_is_handed_on_for_its_model_only():
    model, other = MODELS["mlp"]().model, MODELS["mlp"]().model
    anatomy = Anatomy.of(model)
    with handed_on(anatomy):
        assert Anatomy.of(model) is anatomy and Anatomy.of(other).model is other
    assert Anatomy.of(model) is not anatomy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_model_is_can_be_read_by_people(name):
    anatomy = Anatomy.of(ancestry(name).model)
    text = str(anatomy)
    for stack, count in anatomy.depths.items():
        assert f"\n{stack}: {count} x " in text
    for target in anatomy.groups_of([m.name for m in anatomy.shareable]):
        assert target.num_layers == 1 or target.key.partition(".*.")[2] in text
    for end in anatomy.ends:
        assert any(f"{end.rpartition('.')[0].removeprefix(path + '.')} (" in text for path in _paths(anatomy)), end
    assert max(map(len, text.splitlines())) < 400


def _paths(anatomy):
    return [path for kind in anatomy.blocks for path in kind.paths]


def test_what_stays_dense_is_said_with_the_reason():
    text = str(Anatomy.of(ancestry("sd3").model))
    assert "only one layer has them: transformer_blocks.*.norm1_context.linear#2" in text
    assert str(Anatomy.of(nn.Linear(2, 2))) == "Linear: no repeated blocks, nothing that layers could share."
