# SPDX-License-Identifier: Apache-2.0
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from diffusers_learngene.data.pairs import read_pairs


DATA = Path(__file__).parents[2] / "examples" / "data"


def test_text(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("# mine\nlettuce, mantis\n\n  sea urchin\towl \nbee,frog\n", encoding="utf-8")
    assert read_pairs(path).train == [("lettuce", "mantis"), ("sea urchin", "owl"), ("bee", "frog")]
    assert read_pairs(path).held_out == read_pairs(path).unseen == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("bee, owl\n\nlettuce\n", "line 3: 'lettuce' is no pair of two concepts"),
        ("bee, owl, elk", "line 1: 'bee, owl, elk' is no pair"),
        ("bee, ", "line 1: 'bee,' is no pair"),
        ("bee, bee", "line 1: 'bee, bee' is no pair"),
        ("bee, owl\nelk, bee\nowl, bee", "line 3: the pair owl, bee is there already, in line 1"),
        ("# nothing\n", "holds no pair to train with"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs(tmp_path / "pairs.txt")


@pytest.mark.parametrize(
    "values, message",
    [
        ([["bee", "owl"]], 'must be {"train": [["lettuce", "mantis"], ...]}'),
        ({"train": "bee"}, 'must be {"train":'),
        ({"train": [["bee", "owl"], ["bee", 3]]}, "train[1]: '[\"bee\", 3]' is no pair"),
        (
            {"train": [["bee", "owl"]], "held_out": [["owl", "bee"]]},
            "held_out[0]: the pair owl, bee is there already, in",
        ),
        ({"train": []}, "holds no pair to train with"),
    ],
)
def test_json_that_is_no_list_of_pairs(tmp_path, values, message):
    (tmp_path / "pairs.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs(tmp_path / "pairs.json")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt' cannot be read"):
        read_pairs(tmp_path / "nowhere.txt")
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_pairs(tmp_path / "pairs.json")


def test_the_list_that_is_shipped():
    values = json.loads((DATA / "cangjie_style.json").read_text(encoding="utf-8"))
    script = runpy.run_path(str(DATA / "make_cangjie_style.py"))
    assert script["to_json"](script["make"]()) == (DATA / "cangjie_style.json").read_text(encoding="utf-8")
    groups, unseen = values["groups"], set(values["unseen_concepts"])
    assert [len(group) for group in groups.values()] == [10] * 6 and len(unseen) == 6
    pairs = read_pairs(DATA / "cangjie_style.json")  # which refuses a pair that is there twice
    assert (len(pairs.train), len(pairs.held_out), len(pairs.unseen)) == (200, 27, 24)
    assert {*pairs.concepts} == {concept for group in groups.values() for concept in group}
    assert not unseen & {concept for pair in (*pairs.train, *pairs.held_out) for concept in pair}
    assert all(unseen & {*pair} for pair in pairs.unseen) and ("lettuce", "mantis") in pairs.held_out
    counts = Counter(concept for pair in pairs.train for concept in pair)
    assert len(counts) == 54 and max(counts.values()) - min(counts.values()) <= 2
    assert "re-built" in values["name"]
