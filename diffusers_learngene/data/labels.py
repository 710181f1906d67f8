# SPDX-License-Identifier: Apache-2.0
"""Which labels of a model the classes of a data set are: by name, never by their order alone.

Folders are sorted as text, data sets have an order of their own, and models have a third one. What all of them share
are names: words, ImageNet's synonyms, numbers, WordNet ids.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .imagenet import WNIDS


__all__ = ["in_order", "label_names", "match_labels", "named_by", "read_label_map"]

_logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"[0-9]+")
_WNID = re.compile(r"n[0-9]{8}")
_SHOWN = 8  # names of a list in a message


def in_order(names: Iterable[str]) -> list[str]:
    """The names as they are; numbers by what they say: 0, 1, 2, 10, not 0, 1, 10, 2."""
    names = list(names)
    return sorted(names, key=int) if all(map(_NUMBER.fullmatch, names)) else names


def label_names(id2label: Mapping[Any, str] | None, num_labels: int) -> list[str]:
    """The names of a model's labels, by id; transformers' "LABEL_3" for one without a name.

    Raises:
        ValueError: names of labels that the model does not have.
    """
    named = {int(key): str(name) for key, name in (id2label or {}).items()}
    if beyond := [key for key in named if not 0 <= key < num_labels]:
        raise ValueError(f"id2label names the labels {beyond[:3]}, but the model has {num_labels}, from 0.")
    return [named.get(index, f"LABEL_{index}") for index in range(num_labels)]


def named_by(labels: Sequence[str], others: Mapping[int, str]) -> list[str]:
    """The names of a model's labels, and other names, by id, for those that have none."""
    return [others.get(i, name) if name == f"LABEL_{i}" else name for i, name in enumerate(labels)]


def read_label_map(path: str) -> dict[str, int]:
    """The labels of classes, from a JSON file: `{"tabby_cat": 281, ...}`.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"label_map={path!r} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise ValueError(
            f'label_map={path!r} must hold the model\'s label of every class by its name, {{"tabby_cat": 281, ...}}.'
        )
    return found


def match_labels(
    class_names: Sequence[str],
    labels: Sequence[str],
    label_map: Mapping[str, int] | None = None,
    *,
    among: Sequence[str] | None = None,
) -> list[int]:
    """The label in a model of each class of a data set.

    A class is the label of the same name: to the letter, else whatever its case, spaces and underscores, else if it is
    one of the label's synonyms ("tench, Tinca tinca" has two). Where no class has the name of a label, numbers are
    labels themselves, and WordNet ids those of ImageNet, if the model has 1,000. Where the labels have no names,
    either, classes are labels by position if there are as many: that is logged, because nothing can check it.

    Args:
        class_names: of the data.
        labels: names of the model's labels, by id (`label_names`).
        label_map: labels of classes by name that goes before all this; other classes are matched as said.
        among: all classes of the data, if `class_names` are some of them.

    Raises:
        ValueError: a class that is no label, or might be several; two that are the same one.
    """
    everything, given = list(among or class_names), dict(label_map or {})
    if unknown := [name for name in given if name not in everything]:
        raise ValueError(f"label_map: {_listed(unknown)} are no classes of the data: {_listed(everything)}.")
    if beyond := {name: label for name, label in given.items() if not 0 <= label < len(labels)}:
        raise ValueError(f"label_map: {beyond} are no labels of the model, which has {len(labels)}, from 0.")
    left = [name for name in class_names if name not in given]
    found = {**given, **_by_name(left, labels)}
    if not any(name in found for name in left):
        found |= _by_number(left, labels, everything, bool(given))
    if lost := [name for name in class_names if name not in found]:
        raise ValueError(
            f"{len(lost)} of {len(class_names)} classes of the data are no labels of the model: {_listed(lost)}. "
            f"The data have {_listed(class_names)}; the model has {_listed(labels)}. {_WAY_OUT}"
        )
    return _each_once({name: found[name] for name in class_names}, labels)


_WAY_OUT = 'Say which is which in a label_map, a JSON file of {"class": label, ...} with labels from 0.'


def _by_name(names: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Labels of the classes that have the name of one."""
    wholes, synonyms = [[label] for label in labels], [label.split(",") for label in labels]
    tables = [
        (key, _ids_by_key(parts, key)) for parts, key in ((wholes, str.strip), (wholes, _fold), (synonyms, _fold))
    ]
    found: dict[str, int] = {}
    for name in names:
        ids = next((ids for key, table in tables if (ids := table.get(key(name)))), [])
        if len(ids) > 1:
            shown = " or ".join(f"{index} ({labels[index]!r})" for index in ids)
            raise ValueError(f"the class {name!r} of the data could be the label {shown} of the model. {_WAY_OUT}")
        found |= zip([name] * len(ids), ids, strict=True)
    return found


def _ids_by_key(parts: Sequence[list[str]], key: Callable[[str], str]) -> dict[str, list[int]]:
    """By key, the labels that have a part with it."""
    table: dict[str, list[int]] = {}
    for index, own in enumerate(parts):
        for name in dict.fromkeys(map(key, own)):
            table.setdefault(name, []).append(index)
    return table


def _fold(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _by_number(names: Sequence[str], labels: Sequence[str], everything: list[str], given: bool) -> dict[str, int]:
    """Labels of classes that have no label's name: numbers, WordNet ids, or places where nothing has a name."""
    if all(map(_NUMBER.fullmatch, names)):
        return {name: int(name) for name in names if int(name) < len(labels)}
    if all(map(_WNID.fullmatch, names)) and len(labels) == len(WNIDS):
        places = {wnid: index for index, wnid in enumerate(WNIDS)}
        return {name: places[name] for name in names if name in places}
    if list(labels) != label_names(None, len(labels)) or given or len(everything) != len(labels):
        return {}
    _logger.warning(
        "the model's labels have no names: the %d classes of the data are taken for them in their order, %s.",
        len(everything),
        _listed([f"{name}={index}" for index, name in enumerate(everything)]),
    )
    return {name: everything.index(name) for name in names}


def _each_once(found: Mapping[str, int], labels: Sequence[str]) -> list[int]:
    classes: dict[int, list[str]] = {}
    for name, label in found.items():
        classes.setdefault(label, []).append(name)
    for label, names in classes.items():
        if len(names) > 1:
            raise ValueError(
                f"the classes {names} of the data are all the label {label} ({labels[label]!r}) of the model: put "
                f"them into one. {_WAY_OUT}"
            )
    return list(found.values())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
