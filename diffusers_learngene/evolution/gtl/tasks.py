# SPDX-License-Identifier: Apache-2.0
"""Images by class, the base, critic and novel classes among them, and small tasks drawn from these.

A life is a k-way task on base classes, a critic learns one on critic classes, and the final test is on novel ones. All
draws come from generators that the caller seeds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data.class_split import resolve_classes
from ...data.image_classes import ImageClasses


__all__ = ["ClassImages", "Task", "draw_task", "split_three"]


@dataclass(frozen=True)
class ClassImages:
    """All images of a data set in memory.

    Attributes:
        pixels: uint8 (n, C, H, W).
        rows: by class, the rows of `pixels` that show it.
        names: of the classes.
    """

    pixels: Tensor
    rows: list[Tensor]
    names: list[str]

    @classmethod
    def of(cls, data: ImageClasses) -> "ClassImages":
        """Training and validation images together: what is kept apart here are classes.

        Raises:
            ValueError: a class without images.
        """
        pixels, labels = zip(*(_arrays(part) for part in (data.train, data.validation)), strict=True)
        every = torch.from_numpy(np.concatenate(labels))
        rows = [(every == label).nonzero()[:, 0] for label in range(len(data.class_names))]
        if empty := [name for name, own in zip(data.class_names, rows, strict=True) if not len(own)]:
            raise ValueError(f"there are no images of the classes {empty[:5]}.")
        return cls(torch.cat(pixels), rows, data.class_names)

    @cached_property
    def checksum(self) -> str:
        """Of pixels and classes: two sets with the same one are the same images."""
        found = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for values in (self.pixels, *self.rows):
            found.update(values.contiguous().numpy().data)
        return found.hexdigest()

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def images(self, rows: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Float (*rows.shape, C, H, W) in [-1, 1]."""
        return self.pixels[rows].to(device).float() / 127.5 - 1


def _arrays(data: Dataset) -> tuple[Tensor, np.ndarray]:
    images = [(data[i]["images"] + 1).mul(127.5).round().byte() for i in range(len(data))]  # type: ignore[arg-type]
    return torch.stack(images), np.asarray(data.labels)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Task:
    """A k-way task: rows of images and labels from 0 to k - 1, to train on and to validate on."""

    classes: list[int]
    train_rows: Tensor
    train_labels: Tensor
    validation_rows: Tensor
    validation_labels: Tensor


def draw_task(
    images: ClassImages,
    classes: Sequence[int],
    ways: int,
    generator: torch.Generator,
    *,
    shots: int | None = None,
    validation_shots: int = 0,
) -> Task:
    """Random classes of these, and random images of each.

    Args:
        ways: how many classes.
        shots: images of each to train on; None takes all that are not for validation.
        validation_shots: other images of each, to validate on.

    Raises:
        ValueError: there are not so many classes, or not so many images of one.
    """
    if not 2 <= ways <= len(classes):
        raise ValueError(f"ways={ways} must lie between 2 and the {len(classes)} classes there are.")
    chosen = [classes[place] for place in torch.randperm(len(classes), generator=generator)[:ways].tolist()]
    train, validation = [], []
    for index in chosen:
        rows = images.rows[index][torch.randperm(len(images.rows[index]), generator=generator)]
        if len(rows) < validation_shots + (shots or 1):
            raise ValueError(
                f"class {images.names[index]!r} has {len(rows)} images, fewer than the {shots or 1} to train on and "
                f"{validation_shots} to validate on."
            )
        validation.append(rows[:validation_shots])
        train.append(rows[validation_shots:][:shots])
    labels = torch.arange(ways)
    return Task(
        chosen,
        torch.cat(train),
        labels.repeat_interleave(torch.tensor([len(rows) for rows in train])),
        torch.cat(validation),
        labels.repeat_interleave(validation_shots),
    )


def split_three(
    names: Sequence[str],
    base: Sequence[str] | None = None,
    critic: Sequence[str] | None = None,
    novel: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Base, critic and novel classes: those that are named; of the others, 64, 16 and 20 of 100 in a seeded order.

    Args:
        names: of all classes.
        base, critic, novel: names, or numbers from 0. Where one is not given it gets its share of the classes that no
            other names.

    Raises:
        ValueError: an unknown class, one on two sides, or a side with fewer than two classes.
    """
    given = {"base": base, "critic": critic, "novel": novel}
    found = {
        side: resolve_classes(wanted, names, f"{side}_classes") for side, wanted in given.items() if wanted is not None
    }
    taken = [index for classes in found.values() for index in classes]
    if twice := sorted({names[index] for index in taken if taken.count(index) > 1}):
        raise ValueError(f"{twice[:5]} are on two sides: a class is base, critic or novel.")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    free = [index for index in order if index not in set(taken)]
    shares: Mapping[str, int] = {"base": 64, "critic": 16, "novel": 20}
    absent = [side for side in shares if side not in found]
    start, total, count = 0, sum(shares[side] for side in absent), len(free)
    for place, side in enumerate(absent):
        end = count if place == len(absent) - 1 else start + count * shares[side] // total
        found[side] = sorted(free[start:end])
        start = end
    for side, classes in found.items():
        if len(classes) < 2:
            raise ValueError(f"{side}_classes are {len(classes)} of the {len(names)} classes, and a task takes two.")
    return {side: found[side] for side in shares}
