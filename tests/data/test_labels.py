# SPDX-License-Identifier: Apache-2.0
import json
import logging
import random

import pytest

from diffusers_learngene.data.imagenet import WNIDS
from diffusers_learngene.data.labels import in_order, label_names, match_labels, named_by, read_label_map


IMAGENET = ["tench, Tinca tinca", "great white shark, white shark, man-eater", "crane", "zebra", "crane", "Hen"]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["zebra"], [3]),
        (["hen", "ZEBRA", " zebra"][:2], [5, 3]),
        (["Tinca tinca", "white_shark"], [0, 1]),
        (["tench, Tinca tinca", "Great  White SHARK"], [0, 1]),
        (["3", "1", "05"], [3, 1, 5]),  # numbers are labels where no name is
        (["zebra", "hen", "tench", "man-eater"], [3, 5, 0, 1]),
    ],
)
def test_a_class_is_the_label_of_its_name(names, expected):
    assert match_labels(names, IMAGENET) == expected


def test_whatever_the_order():
    labels = [f"animal {i}" for i in range(50)]
    for seed in range(5):
        classes = random.Random(seed).sample(range(50), 30)
        assert match_labels([labels[i].title() for i in classes], labels) == classes


def test_the_nearer_name_wins():
    """A whole label goes before a synonym, and a letter before its case."""
    assert match_labels(["maillot", "Bus"], ["maillot, tank suit", "bus", "maillot", "Bus"]) == [2, 3]
    assert match_labels(["1", "0"], ["1", "0"]) == [0, 1]  # digits that are names


def test_numbers_are_numbers():
    labels = label_names(None, 12)
    assert match_labels(["0", "1", "10", "2"], labels) == [0, 1, 10, 2]
    assert in_order(["0", "1", "10", "2"]) == ["0", "1", "2", "10"] and in_order(["010", "9"]) == ["9", "010"]
    assert in_order(["b", "a", "10", "2"]) == ["b", "a", "10", "2"]


@pytest.mark.parametrize("labels", [label_names(None, 1000), [f"thing {i}" for i in range(1000)]])
def test_wordnet_ids(labels):
    some = random.Random(0).sample(range(1000), 100)
    assert match_labels([WNIDS[i] for i in some], labels) == some
    assert match_labels(sorted(WNIDS), labels) == list(range(1000))
    assert WNIDS[0] == "n01440764" and WNIDS[281] == "n02123045" and WNIDS[999] == "n15075141"
    with pytest.raises(ValueError, match="1 of 2 classes of the data are no labels of the model: n00000001"):
        match_labels(["n01440764", "n00000001"], labels)
    with pytest.raises(ValueError, match="2 of 2 classes"):
        match_labels(["n01440764", "n01443537"], labels[:999])  # another model


def test_without_names_position_counts_and_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert match_labels(["bee", "ant"], label_names(None, 2)) == [0, 1]
    assert "no names: the 2 classes of the data are taken for them in their order, bee=0, ant=1" in caplog.text
    assert match_labels(["ant"], label_names({}, 3), among=["bee", "ant", "cat"]) == [1]
    with pytest.raises(ValueError, match=r"2 of 2 classes.* bee, ant\. The data have bee, ant; the model has LABEL_0"):
        match_labels(["bee", "ant"], label_names(None, 3))
    with pytest.raises(ValueError, match="2 of 2 classes"):
        match_labels(["bee", "ant"], ["cat", "dog"])  # as many, but they have names


@pytest.mark.parametrize(
    "names, labels, message",
    [
        (["zebra", "owl", "bee"], IMAGENET, r"2 of 3 classes of the data are no labels of the model: owl, bee\."),
        (["crane"], IMAGENET, r"'crane' of the data could be the label 2 \('crane'\) or 4 \('crane'\)"),
        (["zebra", "Zebra"], IMAGENET, r"\['zebra', 'Zebra'\] of the data are all the label 3 \('zebra'\)"),
        (["1", "01"], IMAGENET, "are all the label 1"),
        (["1", "6"], IMAGENET, "1 of 2 classes of the data are no labels of the model: 6"),
        (["1", "zebra"], IMAGENET, "1 of 2 classes of the data are no labels of the model: 1"),
        ([f"c{i}" for i in range(20)], IMAGENET, r"c0, .*c7, \.\.\. \(20 in all\)"),
    ],
)
def test_what_does_not_match_is_refused_with_a_way_out(names, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        match_labels(names, labels)
    assert "label_map" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_label_map_goes_first(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"owl": 4, "crane": 2}))
    label_map = read_label_map(str(path))
    assert match_labels(["owl", "zebra", "crane"], IMAGENET, label_map) == [4, 3, 2]
    assert match_labels(["7", "owl"], label_names(None, 9), {"owl": 0}) == [7, 0]
    assert match_labels(["owl"], IMAGENET, {"owl": 4, "bat": 1}, among=["bat", "owl"]) == [4]


@pytest.mark.parametrize(
    "label_map, message",
    [
        ({"bat": 1}, "label_map: bat are no classes of the data: owl, zebra"),
        ({"owl": 6}, "{'owl': 6} are no labels of the model, which has 6, from 0"),
        ({"owl": -1}, "are no labels of the model"),
        ({"owl": 3}, "are all the label 3"),
        ({}, "1 of 2 classes"),
    ],
)
def test_a_label_map_is_checked(label_map, message):
    with pytest.raises(ValueError, match=message):
        match_labels(["owl", "zebra"], IMAGENET, label_map)


@pytest.mark.parametrize("text", ["[1]", '{"owl": "4"}', '{"owl": true}', '{"owl": 1.0}', "owl: 4"])
def test_a_label_map_is_a_json_file_of_numbers(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match="label_map='.*map.json' (must hold|cannot be read)"):
        read_label_map(str(tmp_path / "map.json"))
    with pytest.raises(ValueError, match="label_map='nowhere' cannot be read"):
        read_label_map("nowhere")


def test_names_of_labels():
    assert label_names({"1": "owl", 0: "bat"}, 3) == ["bat", "owl", "LABEL_2"]
    assert named_by(["bat", "LABEL_1"], {0: "x", 1: "owl"}) == ["bat", "owl"]
    with pytest.raises(ValueError, match=r"id2label names the labels \[3\], but the model has 3"):
        label_names({3: "owl"}, 3)
