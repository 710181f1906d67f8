# SPDX-License-Identifier: Apache-2.0
"""Leaving classes of a KIND learngene out, and adding new ones: on its config and tensors, as they lie in the file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..anatomy.dit import LabelInit, label_table, new_label_rows
from ..anatomy.models import empty_model, num_labels, with_labels
from ..tuners.base_config import check_integer
from ..tuners.kind.classes import (
    ClassTailors,
    Sizes,
    check_classes,
    components,
    join_classes,
    join_tailors,
    keep_classes,
    num_units,
    proportion,
    tailors_of_new_class,
)
from .artefact import ArtefactConfig
from .layout import Layout


Artefact = tuple[ArtefactConfig, dict[str, Tensor]]


def select_classes(
    config: ArtefactConfig, tensors: Mapping[str, Tensor], layout: Layout, classes: Sequence[int]
) -> Artefact:
    """Learngenes, and the tailors of these classes; ids stay what they are, and the other classes are unknown.

    Raises:
        ValueError: classes that are not there, or of a group without learngenes, no class that has tailors.
    """
    check_classes(classes, config.class_tailors)
    before = config.class_tailors or []
    class_tailors, units = keep_classes(before, classes)
    sizes, cut = {}, dict(tensors)
    for key, size in config.bank_sizes.items():
        kept = components(size, units, num_units(before))
        if not kept:
            raise ValueError(f"classes={list(classes)} leaves nothing of {key}, which has no learngenes.")
        sizes[key] = [size[0], len(kept) - size[0]]
        cut |= {name: tensors[name][..., kept] for name in _by_component(config, layout, key)}
    return replace(config, bank_sizes=sizes, class_tailors=class_tailors), cut


def new_tailors(config: ArtefactConfig, count: int, per_class: int | None) -> dict[str, list[int]]:
    """[0, num_tailors] of `count` new classes by group (`classes.tailors_of_new_class`).

    Raises:
        ValueError: there are no classes, or no number of tailors that fits them.
    """
    if config.class_tailors is None:
        raise ValueError(f"num_new_classes={count}: only a learngene of KIND has classes.")
    if per_class is not None:
        check_integer("tailors_per_class", per_class)
    each = tailors_of_new_class(config.bank_sizes, config.class_tailors, per_class)
    return {key: [0, count * tailors] for key, tailors in each.items()}


def add_labels(
    config: ArtefactConfig, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor], count: int
) -> Artefact:
    """With `count` classes more, which have no tailors. Their ids follow the old ones', and the null class theirs.

    Args:
        rows: tables of label rows by key (`label_rows`).
    """
    labels = len(config.class_tailors or ()) + count
    class_tailors = [*(config.class_tailors or ()), *([] for _ in range(count))]
    base_config = with_labels(config.architecture, config.base_config, labels)
    return replace(config, base_config=base_config, class_tailors=class_tailors), {**tensors, **rows}


def label_rows(config: ArtefactConfig, tensors: Mapping[str, Tensor], count: int, how: LabelInit) -> dict[str, Tensor]:
    """The table of label rows with new ones, by key (`dit.new_label_rows`); none, if the model has no labels."""
    if num_labels(config.architecture, config.base_config) is None:
        return {}
    key = f"sizes.0.shared.{label_table(empty_model(config.architecture, config.base_config))}.weight"
    known = [index for index, units in enumerate(config.class_tailors or ()) if units is not None]
    return {key: new_label_rows(tensors[key], count, how, known)}


def join_novel(
    config: ArtefactConfig,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    new_sizes: Sizes,
    new_tailors: ClassTailors,
    new_tensors: Mapping[str, Tensor],
) -> Artefact:
    """With the tailors of an added adapter among its own.

    Args:
        new_sizes: [0, num_tailors] by group.
        new_tailors: which class opens which of the added tailors.
        new_tensors: of the adapter, with the keys of `tensors`.

    Raises:
        ValueError: learngenes of their own, or groups with new and old tailors in different proportions.
    """
    if any(learngenes for learngenes, _ in new_sizes.values()):
        raise ValueError(f"the added adapter has learngenes of its own, which no class could be without: {new_sizes}.")
    before = config.class_tailors or []
    ratio = proportion(config.bank_sizes, before, new_sizes, new_tailors)
    class_tailors = join_classes(before, new_tailors, ratio)
    sizes, joined = dict(config.bank_sizes), dict(tensors)
    for key, (_, added) in new_sizes.items():
        learngenes, tailors = config.bank_sizes[key]
        sizes[key] = [learngenes, tailors + added]
        for name in _by_component(config, layout, key):
            joined[name] = join_tailors(tensors[name], new_tensors[name], learngenes, num_units(class_tailors))
    return replace(config, bank_sizes=sizes, class_tailors=class_tailors), joined


def _by_component(config: ArtefactConfig, layout: Layout, group: str) -> list[str]:
    """Names of the tensors of a group whose last axis lists its components."""
    scalers = dict.fromkeys(f"sizes.0.{part.scaler}" for part in layout.parts(group))
    return [*(f"{name}.{group}" for name in config.factors.bank_tensors), *scalers]
