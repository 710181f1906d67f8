# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from diffusers_learngene.evolution.lineage import Individual, Lineage
from diffusers_learngene.evolution.plots import draw_lineage


@pytest.fixture
def lineage():
    """0 and 1, then 2 and 3 of 0, then 4 of 3; the last has not lived."""
    tree = Lineage([Individual(0, 0, facts={"task": "a"}), Individual(1, 0)])
    for id, generation, parent in ((2, 1, 0), (3, 1, 0), (4, 2, 3)):
        tree.add(Individual(id, generation, parent))
    for id, fitness in enumerate((0.1, 0.2, 0.3, 0.4)):
        tree.record(id, fitness=fitness, mutation=f"swap {id}")
    return tree


def test_ancestors_and_generations(lineage):
    assert lineage.ancestors(4) == [3, 0] and lineage.ancestors(1) == []
    assert [one.id for one in lineage.of_generation(1)] == [2, 3]
    assert lineage.fitness() == [[0.1, 0.2], [0.3, 0.4], []]
    assert lineage[0].facts == {"task": "a", "mutation": "swap 0"}


def test_it_is_json(lineage):
    again = Lineage.from_json(json.loads(json.dumps(lineage.as_json())))
    assert list(again) == list(lineage)
    for broken in ({}, [{"id": 0}], [*lineage.as_json()[2:]]):
        with pytest.raises(ValueError, match="lineage is a list|parent of"):
            Lineage.from_json(broken)


@pytest.mark.parametrize("one", [Individual(0, 1), Individual(9, 1, parent=8), Individual(9, 1, parent=2)])
def test_impossible_individuals_are_refused(lineage, one):
    with pytest.raises(ValueError, match=r"there already|must be of an earlier generation"):
        lineage.add(one)


def test_it_is_drawn(lineage, tmp_path):
    draw_lineage(lineage, 3, tmp_path / "new" / "lineage.png", facts=["mutation"])
    image = Image.open(tmp_path / "new" / "lineage.png").convert("RGB")
    assert (0, 114, 178) in {color for count, color in image.getcolors(1 << 20) if count > 50}
    with pytest.raises(ValueError, match="winner=4 has no fitness"):
        draw_lineage(lineage, 4, tmp_path / "lineage.png")
