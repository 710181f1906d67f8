# SPDX-License-Identifier: Apache-2.0
"""Which class of a KIND opens which tailors, as data, and the arithmetic of leaving classes out and adding new ones.

The tailors of every group belong to the same *units*, as many to each, which take turns: of n units, unit i has the
tailors i, n + i, 2 n + i, ... (`functional.kind`). A class opens some units, in all groups alike:

    class_tailors = [[0], [1], [1], None]    4 classes and 2 units, of which classes 1 and 2 share the second

None is a class that is not known: its label is refused. [] is one that has only the learngenes, as the null class of
classifier-free guidance has, which comes after the last class and is not listed. No unit is nobody's.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


ClassTailors = list[list[int] | None]
Sizes = Mapping[str, Sequence[int]]  # [num_learngene, num_tailors] by group


def num_units(class_tailors: ClassTailors) -> int:
    """How many units the tailors fall into."""
    return 1 + max((unit for units in class_tailors for unit in units or ()), default=-1)


def check_class_tailors(value: Any, sizes: Sizes, num_classes: int | None) -> None:
    """Raise a ValueError unless `value`, which came from a file, assigns the tailors of groups of these sizes.

    Args:
        num_classes: how many classes the model itself has labels for; None: it has no labels.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"class_tailors={value!r} must be a list with an entry for every class.")
    if num_classes is not None and len(value) != num_classes:
        raise ValueError(f"class_tailors has {len(value)} classes, but the model has labels for {num_classes}.")
    for index, units in enumerate(value):
        if units is None:
            continue
        whole = isinstance(units, list) and all(type(unit) is int and unit >= 0 for unit in units)
        if not whole or units != sorted(set(units)):
            raise ValueError(f"class_tailors[{index}]={units!r} must be null, or ascending numbers of tailor units.")
    count = num_units(value)
    if len({unit for units in value for unit in units or ()}) != count:
        raise ValueError(f"class_tailors has units up to {count - 1}, but some of them belong to no class.")
    for key, (_, tailors) in sizes.items():
        if tailors % count if count else tailors:
            raise ValueError(f"the {tailors} tailors of {key} cannot fall into the {count} units of class_tailors.")


def check_classes(classes: Sequence[int], class_tailors: ClassTailors | None) -> None:
    """Raise a ValueError unless `classes` are different classes that are known."""
    if class_tailors is None:
        raise ValueError(f"classes={classes!r}: only a learngene of KIND has classes.")
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise ValueError(f"classes={classes!r} must be a list of class ids.")
    for index in classes:
        if type(index) is not int or not 0 <= index < len(class_tailors):
            raise ValueError(f"classes={classes!r}: {index!r} is no class id from 0 to {len(class_tailors) - 1}.")
        if class_tailors[index] is None:
            known = [c for c, units in enumerate(class_tailors) if units is not None]
            raise ValueError(f"classes={classes!r}: this learngene does not know class {index}, only {known}.")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes={classes!r} names a class twice.")


def keep_classes(class_tailors: ClassTailors, classes: Sequence[int]) -> tuple[ClassTailors, list[int]]:
    """Only these classes known, with their units numbered anew; and which units these were."""
    kept = sorted({unit for index in classes for unit in class_tailors[index] or ()})
    rank = {unit: place for place, unit in enumerate(kept)}
    known = set(classes)
    return [
        [rank[unit] for unit in units] if units is not None and index in known else None
        for index, units in enumerate(class_tailors)
    ], kept


def components(size: Sequence[int], units: Sequence[int], count: int) -> list[int]:
    """Indices of the learngenes of a group, and of the tailors of these of its `count` units, in the same rounds."""
    learngenes, tailors = size
    rounds = range(learngenes, learngenes + tailors, max(1, count))
    return [*range(learngenes), *(start + unit for start in rounds for unit in units)]


def tailors_of_new_class(sizes: Sizes, class_tailors: ClassTailors, per_class: int | None) -> dict[str, int]:
    """How many tailors a new class gets, by group: as many as the best provided old one has, or `per_class`.

    Raises:
        ValueError: a number is given although groups have different numbers, or none although there are no tailors.
    """
    count = num_units(class_tailors)
    most = max((len(units) for units in class_tailors if units is not None), default=0)
    old = {key: tailors // count * most if count else 0 for key, (_, tailors) in sizes.items()}
    if per_class is None:
        if not any(old.values()):
            raise ValueError("tailors_per_class: this learngene has no tailors to go by, so say how many.")
        return old
    if len({tailors for tailors in old.values() if tailors}) > 1:
        raise ValueError(f"tailors_per_class={per_class}: groups have different numbers, {old}: leave it out.")
    return {key: per_class if tailors or not any(old.values()) else 0 for key, tailors in old.items()}


def proportion(sizes: Sizes, class_tailors: ClassTailors, new_sizes: Sizes, new_tailors: ClassTailors) -> Fraction:
    """Tailors of a new unit to those of an old one, in every group; 1 if there are none of either.

    Raises:
        ValueError: the proportion is not the same in all groups.
    """
    pairs = {(tailors, new_sizes.get(key, (0, 0))[1]) for key, (_, tailors) in sizes.items()}
    if not num_units(class_tailors) or not num_units(new_tailors):
        return Fraction(1)
    per_unit = [Fraction(num_units(class_tailors), num_units(new_tailors)) * Fraction(n, o) for o, n in pairs if o]
    if len(set(per_unit)) != 1 or 0 in per_unit or any(new and not old for old, new in pairs):
        raise ValueError(f"Groups have old and new tailors in different proportions: {sorted(pairs)}.")
    return per_unit[0]


def join_classes(class_tailors: ClassTailors, new_tailors: ClassTailors, ratio: Fraction) -> ClassTailors:
    """The assignment of both, over units so small that an old one and a new one, in this `ratio`, are whole numbers.

    In every round, the old units' tailors come first (`join_tailors`).
    """
    old_count, new_count = num_units(class_tailors), num_units(new_tailors)
    old_parts, new_parts = range(ratio.denominator), range(ratio.numerator)
    start = old_count * len(old_parts)
    return [
        None
        if old is None
        else [part * old_count + unit for part in old_parts for unit in old]
        + [start + part * new_count + unit for part in new_parts for unit in new or ()]
        for old, new in zip(class_tailors, new_tailors, strict=True)
    ]


def join_tailors(old: Tensor, new: Tensor, num_learngene: int, count: int) -> Tensor:
    """Components (..., r) of a layer with new tailors (..., t) among them, over `count` units (`join_classes`)."""
    learngenes, tailors = old[..., :num_learngene], old[..., num_learngene:]
    rounds = (tailors.shape[-1] + new.shape[-1]) // max(1, count)
    if not rounds:
        return old
    turns = [part.unflatten(-1, (rounds, part.shape[-1] // rounds)) for part in (tailors, new)]
    return torch.cat([learngenes, torch.cat(turns, dim=-1).flatten(-2)], dim=-1)
