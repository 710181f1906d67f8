# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest
import torch

from diffusers_learngene.data.image_classes import ImageClasses
from diffusers_learngene.data.images import LabelledImages
from diffusers_learngene.evolution.gtl.tasks import ClassImages, draw_task, split_three


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def class_of(images, row):
    return next(index for index, rows in enumerate(images.rows) if row in rows)


@pytest.mark.parametrize("shots, count", [(3, 3), (None, 6)])
def test_a_task(images, shots, count):
    task = draw_task(images, [3, 5, 7, 9], 3, draws(), shots=shots, validation_shots=4)
    assert len(set(task.classes)) == 3 and set(task.classes) <= {3, 5, 7, 9}
    for rows, labels, each in (
        (task.train_rows, task.train_labels, count),
        (task.validation_rows, task.validation_labels, 4),
    ):
        assert [class_of(images, row) for row in rows] == [task.classes[label] for label in labels]
        assert labels.bincount().tolist() == [each] * 3
    rows = torch.cat([task.train_rows, task.validation_rows]).tolist()
    assert len(set(rows)) == len(rows)  # no image is in both
    again = draw_task(images, [3, 5, 7, 9], 3, draws(), shots=shots, validation_shots=4)
    assert torch.equal(task.train_rows, again.train_rows)


@pytest.mark.parametrize(
    "ways, shots, message",
    [(5, 1, "ways=5 must lie between 2 and the 4"), (1, 1, "ways=1"), (2, 9, "has 10 images, fewer than the 9")],
)
def test_a_task_that_cannot_be(images, ways, shots, message):
    with pytest.raises(ValueError, match=message):
        draw_task(images, [3, 5, 7, 9], ways, draws(), shots=shots, validation_shots=4)


def test_images_of_both_splits_and_their_values():
    pixels = np.arange(8 * 4, dtype=np.uint8).reshape(8, 1, 2, 2) * 8
    data = ImageClasses(
        train=LabelledImages(pixels[:5], np.array([0, 1, 0, 1, 1])),
        validation=LabelledImages(pixels[5:], np.array([1, 0, 0])),
        class_names=["a", "b"],
        channels=1,
        resolution=2,
    )
    images = ClassImages.of(data)
    assert np.array_equal(images.pixels.numpy(), pixels) and images.channels == 1
    assert [rows.tolist() for rows in images.rows] == [[0, 2, 6, 7], [1, 3, 4, 5]]
    assert torch.equal(images.images(torch.tensor([[5]]))[0, 0], data.validation[0]["images"])
    with pytest.raises(ValueError, match=re.escape("no images of the classes ['c']")):
        ClassImages.of(ImageClasses(data.train, data.validation, ["a", "b", "c"], 1, 2))


def test_the_default_split_is_that_of_cifar_fs():
    names = [f"class {index}" for index in range(100)]
    split = split_three(names)
    assert [len(split[side]) for side in ("base", "critic", "novel")] == [64, 16, 20]
    assert sorted(sum(split.values(), [])) == list(range(100)) and split == split_three(names)
    assert split["novel"] != list(range(80, 100))  # scripts and alphabets are mixed


def test_a_split_that_is_given():
    names = list("abcdefghij")
    assert split_three(names, list("abc"), ["d", "4"], list("jih")) == {
        "base": [0, 1, 2],
        "critic": [3, 4],
        "novel": [9, 8, 7],
    }
    split = split_three(names, novel=["a", "b"])
    assert split["novel"] == [0, 1] and len(split["base"]) == 6 and len(split["critic"]) == 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base": ["a", "k"]}, "base_classes: ['k'] are no classes"),
        ({"base": ["a", "b"], "novel": ["b", "c"]}, "['b'] are on two sides"),
        ({"critic": ["a"]}, "critic_classes are 1 of the 10"),
        ({"base": list("abcdefghi")}, "critic_classes are 0 of the 10"),
    ],
)
def test_a_split_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_three(list("abcdefghij"), **given)
