# SPDX-License-Identifier: Apache-2.0
"""Which classes of a data set a model is trained on first, and which it meets later."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .image_classes import ImageClasses
from .labels import named_by


__all__ = [
    "ClassSplit",
    "read_class_groups",
    "relabel_classes",
    "resolve_classes",
    "select_classes",
    "split_classes",
]

MIN_IMAGES = 4  # of a class, to train on


@dataclass(frozen=True)
class ClassSplit:
    """Images of base and of novel classes, under the labels 0, 1, ... of the base classes and then the novel ones.

    Attributes:
        classes: label in the data set of each of these labels.
        num_base: how many of them are base classes.
        base, novel: images of these classes only; `novel` knows the names of the base classes, too.
    """

    classes: list[int]
    num_base: int
    base: ImageClasses
    novel: ImageClasses

    @property
    def num_novel(self) -> int:
        return len(self.classes) - self.num_base


def split_classes(
    data: ImageClasses,
    base_classes: Sequence[str] | None = None,
    novel_classes: Sequence[str] | None = None,
    *,
    images_per_novel_class: int | None = None,
) -> ClassSplit:
    """Split by class; by default the first 7 of 10 classes are base classes, and those that are left are novel.

    Args:
        base_classes, novel_classes: names, or numbers from 0.
        images_per_novel_class: train on so many of each only.

    Raises:
        ValueError: an unknown class, one on both sides or twice, an empty side, or a class with too few images.
    """
    everything = range(len(data.class_names))
    novel = None if novel_classes is None else resolve_classes(novel_classes, data.class_names, "novel_classes")
    if base_classes is not None:
        base = resolve_classes(base_classes, data.class_names, "base_classes")
    else:
        free = [c for c in everything if c not in (novel or ())]
        base = free if novel is not None else free[: max(1, len(free) * 7 // 10)]
    if novel is None:
        novel = [c for c in everything if c not in base]
    if shared := [data.class_names[c] for c in novel if c in base]:
        raise ValueError(f"{shared} are base classes and novel classes: a class is novel, or it is not.")
    for name, classes in (("base_classes", base), ("novel_classes", novel)):
        if not classes:
            raise ValueError(f"{name} are none of the {len(everything)} classes.")
    classes, everyone = [*base, *novel], select_classes(data, [*base, *novel])
    labels = everyone.train.labels  # type: ignore[attr-defined]
    for label, index in enumerate(classes):
        least = max(MIN_IMAGES, images_per_novel_class or 0) if index in novel else MIN_IMAGES
        if (count := int((labels == label).sum())) < least:
            wanted = f" (images_per_novel_class={images_per_novel_class})" if least > MIN_IMAGES else ""
            raise ValueError(f"class {data.class_names[index]!r} has {count} images to train on, not {least}{wanted}.")
    old, new = range(len(base)), range(len(base), len(classes))
    sides = {
        "base": replace(
            everyone,
            train=_only(everyone.train, old),
            validation=_only(everyone.validation, old),
            class_names=everyone.class_names[: len(base)],
        ),
        "novel": replace(
            everyone,
            train=_only(everyone.train, new, images_per_novel_class),
            validation=_only(everyone.validation, new),
        ),
    }
    for name, side in sides.items():
        if not len(side.validation):  # type: ignore[arg-type]
            raise ValueError(f"{name}_classes have no validation image.")
    return ClassSplit(classes, len(base), sides["base"], sides["novel"])


def select_classes(data: ImageClasses, classes: Sequence[int]) -> ImageClasses:
    """Images of these classes only, under labels that say their places in `classes`."""
    place = {index: label for label, index in enumerate(classes)}
    train: Any = data.train
    validation: Any = data.validation
    return replace(
        data,
        train=_Selected(train, _rows(train.labels, classes), place),
        validation=_Selected(validation, _rows(validation.labels, classes), place),
        class_names=[data.class_names[index] for index in classes],
    )


def relabel_classes(data: ImageClasses, labels: Sequence[int], names: Sequence[str]) -> ImageClasses:
    """The same images under the labels of a model.

    Args:
        labels: of each class (`labels.match_labels`).
        names: of all labels of the model (`labels.label_names`); one without a name has that of its class.
    """
    class_names = named_by(names, dict(zip(labels, data.class_names, strict=True)))
    if list(labels) == list(range(len(labels))):
        return replace(data, class_names=class_names)
    place = dict(enumerate(labels))
    train, validation = (_Selected(side, range(len(side)), place) for side in (data.train, data.validation))  # type: ignore[arg-type]
    return replace(data, train=train, validation=validation, class_names=class_names)


def resolve_classes(wanted: Sequence[str], class_names: Sequence[str], name: str) -> list[int]:
    """Classes by name or, where no class has that name, by number.

    Raises:
        ValueError: an unknown class, or one twice.
    """
    index = {str(number): number for number in range(len(class_names))}
    index |= {class_name: number for number, class_name in enumerate(class_names)}
    if unknown := [entry for entry in wanted if str(entry) not in index]:
        raise ValueError(
            f"{name}: {unknown[:5]} are no classes of the data; these are numbers from 0 to {len(class_names) - 1}, "
            f"or names: {', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}."
        )
    found = [index[str(entry)] for entry in wanted]
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: {sorted(c for c in class_names if found.count(index[c]) > 1)} are there twice.")
    return found


def read_class_groups(path: str, class_names: Sequence[str]) -> list[list[int]]:
    """Groups of classes that are to share tailors, from a JSON file: `{"cats": ["tabby", 282], ...}`, or the lists.

    Args:
        class_names: of the classes that are grouped; every one has to be in a group, and may be in several.

    Raises:
        ValueError: no such file, no groups in it, an unknown class, or a class of no group.
    """
    try:
        groups = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"class_groups={path!r} cannot be read: {error}") from error
    groups = list(groups.values()) if isinstance(groups, Mapping) else groups
    if not isinstance(groups, list) or not groups or not all(map(_is_group, groups)):
        raise ValueError(
            f"class_groups={path!r} must hold lists of classes by name or number, "
            '[["tabby", 282], ["beagle"]], or such lists with names.'
        )
    found = [resolve_classes(group, class_names, f"class_groups={path!r}") for group in groups]
    grouped = {label for group in found for label in group}
    if lonely := [name for label, name in enumerate(class_names) if label not in grouped]:
        raise ValueError(f"class_groups={path!r}: {lonely[:5]} are in no group; a class may have one of its own.")
    return found


def _is_group(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) in (int, str) for entry in value)


class _Selected(Dataset[dict[str, Any]]):
    """Some rows of a data set of labelled images, under other labels."""

    def __init__(self, images: Any, rows: Sequence[int], place: Mapping[int, int]) -> None:
        self.images, self.rows, self.place = images, rows, place

    @property
    def labels(self) -> np.ndarray:
        """(n,), for which no image is decoded."""
        table = np.zeros(max(self.place) + 1, dtype=int)
        table[list(self.place)] = list(self.place.values())
        return table[self.images.labels[self.rows]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[self.rows[index]]
        return {**item, "labels": self.place[item["labels"]]}


def _only(images: Any, labels: range, each: int | None = None) -> Dataset[dict[str, Any]]:
    """Images with labels of this range, of each label the first so many."""
    return _Selected(images, _rows(images.labels, labels, each), {label: label for label in labels})


def _rows(labels: np.ndarray, wanted: Sequence[int], each: int | None = None) -> list[int]:
    chosen = [np.flatnonzero(labels == label)[:each] for label in wanted]
    return np.sort(np.concatenate(chosen)).tolist()
