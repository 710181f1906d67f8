# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from diffusers_learngene.data.class_split import read_class_groups, resolve_classes, select_classes, split_classes
from diffusers_learngene.data.image_classes import ImageClasses
from diffusers_learngene.data.images import LabelledImages, WithMirrorImages


NAMES = ["ant", "bee", "2", "cat", "dog"]


def labelled(labels):
    """Images whose pixels are all 10 times their class."""
    labels = np.array(labels)
    return LabelledImages(
        (np.ones((len(labels), 1, 2, 2)) * 10 * labels[:, None, None, None]).astype(np.uint8), labels
    )


@pytest.fixture
def data():
    return ImageClasses(labelled([0, 1, 2, 3, 4] * 6), labelled([4, 3, 2, 1, 0]), NAMES, channels=1, resolution=2)


def classes_in(images):
    """By label, the classes that the pixels say."""
    items = [images[index] for index in range(len(images))]
    return {item["labels"]: round((item["images"].mean().item() + 1) * 127.5 / 10) for item in items}


def test_labels_are_places_among_the_classes(data):
    selected = select_classes(data, [3, 1])
    assert selected.class_names == ["cat", "bee"] and len(selected.train) == 12 and len(selected.validation) == 2
    assert classes_in(selected.train) == classes_in(selected.validation) == {0: 3, 1: 1}


def test_base_classes_come_first(data):
    split = split_classes(data, ["cat", "0"], ["bee"])
    assert split.classes == [3, 0, 1] and (split.num_base, split.num_novel) == (2, 1)
    assert classes_in(split.base.train) == {0: 3, 1: 0} and classes_in(split.novel.validation) == {2: 1}
    assert split.base.class_names == ["cat", "ant"] and split.novel.class_names == ["cat", "ant", "bee"]


@pytest.mark.parametrize(
    "base, novel, expected",
    [
        (None, None, ([0, 1, 2], [3, 4])),
        (None, ["ant"], ([1, 2, 3, 4], [0])),
        (["dog", "bee"], None, ([4, 1], [0, 2, 3])),
    ],
)
def test_what_is_not_given(data, base, novel, expected):
    split = split_classes(data, base, novel)
    assert (split.classes[: split.num_base], split.classes[split.num_base :]) == expected


def test_few_shots(data):
    split = split_classes(data, images_per_novel_class=2)
    assert len(split.novel.train) == 4 and len(split.base.train) == 18 and len(split.novel.validation) == 2


def test_mirror_images_have_labels(data):
    mirrored = ImageClasses(WithMirrorImages(data.train), data.validation, NAMES, 1, 2)
    selected = select_classes(mirrored, [4])
    assert len(selected.train) == 12 and torch.equal(selected.train[0]["images"], data.train[4]["images"])


@pytest.mark.parametrize(
    "base, novel, message",
    [
        (["ant", "bee"], ["1", "cat"], r"\['bee'\] are base classes and novel classes"),
        (["ant", "ant"], None, r"base_classes: \['ant'\] are there twice"),
        (["cow"], None, r"base_classes: \['cow'\] are no classes of the data; these are numbers from 0 to 4"),
        (NAMES, None, "novel_classes are none of the 5 classes"),
    ],
)
def test_impossible_splits(data, base, novel, message):
    with pytest.raises(ValueError, match=message):
        split_classes(data, base, novel)


def test_too_few_images(data):
    with pytest.raises(ValueError, match="class 'ant' has 3 images to train on, not 4"):
        split_classes(ImageClasses(labelled([0] * 3 + [1] * 9), data.validation, NAMES[:2], 1, 2))
    with pytest.raises(ValueError, match=r"'cat' has 6 images to train on, not 7 \(images_per_novel_class=7\)"):
        split_classes(data, images_per_novel_class=7)
    with pytest.raises(ValueError, match="novel_classes have no validation image"):
        split_classes(ImageClasses(data.train, labelled([0, 1]), NAMES, 1, 2), ["ant"], ["bee"][:0] + ["dog"])


def test_a_name_wins_over_a_number():
    assert resolve_classes(["2", "1"], ["1", "x", "y"], "classes") == [2, 0]


@pytest.mark.parametrize("named", [True, False])
def test_groups(named, tmp_path):
    groups = {"insects": ["ant", 1], "rest": ["2", "cat", "dog", "ant"]}
    (tmp_path / "groups.json").write_text(json.dumps(groups if named else list(groups.values())))
    assert read_class_groups(str(tmp_path / "groups.json"), NAMES) == [[0, 1], [2, 3, 4, 0]]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[0, 1]", '["ant"]', '[["ant"], []]', "[[true]]", "[[1.5]]", '"ant"']
)
def test_malformed_groups(content, tmp_path):
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(ValueError, match="class_groups="):
        read_class_groups(str(tmp_path / "groups.json"), NAMES)
