# SPDX-License-Identifier: Apache-2.0
"""Config of KIND: how many components, and which classes open which of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...anatomy.blocks import Group
from ...functional import fine, kind
from ..base_config import MAX_NUMBERS, LearngeneConfig, check_integer, check_numbers, check_pattern
from ..fine.config import check_smaller_side, fused_shape
from ..peft_types import LearngenePeftType


# Its docstring is completed with the fields of LearngeneConfig.
@dataclass
class KINDConfig(LearngeneConfig):
    """Config of KIND: every matrix is U diag(sigma * g(c)) V^T, where the gate g opens tailors for the class c.

    Classes are those of the model's `class_labels`, or of `class_gate`. The null class, `num_classes`, opens
    learngenes only. A class of no group is unknown: its label is refused, rather than answered with what was never
    learned. In generate mode the model can be taken apart by class.

    Args:
        num_learngene: components that are always on, of each layer of a group; no more than its smaller side. Default
            in add mode: 8, the rank PEFT users start from, or the smaller side if that is less. Default in generate
            mode: half the smaller side (`functional.kind.default_sizes`). 0: tailors only, so that an added adapter
            leaves every class without tailors bit for bit as it was.
        tailors_per_class: components of each class, or of each of `class_groups`. Default in add mode: 1; in generate
            mode: a 64th of the smaller side, at least 1.
        num_classes: classes, without the null class. Default: as many as the model's own config says
            (`num_embeds_ada_norm` of a DiT). 0: learngenes only, and no gate is needed.
        class_groups: classes that share tailors, `[[0, 1], [4]]` or by name, `{"cats": [0, 1], "dogs": [4]}`; a class
            may be in several, as in a hierarchy, and opens the tailors of each. Default: every class by itself.
        class_gate: which tailors a class opens, as a row of zeros and ones for every class, instead of the two above;
            a row of zeros is a class that is known, and has none.
        known_classes: classes whose labels are accepted. Default: those of `class_groups`; without them, all.
        group_sizes: `{group: [learngenes, tailors]}` of these groups of layers instead, where tailors are a multiple
            of the classes (or class groups, or columns of `class_gate`), which take turns (`functional.kind`).

    Raises:
        ValueError: a field has the wrong type or an impossible value.

    Source: KIND, https://arxiv.org/abs/2408.07337.
    """

    pattern_name: ClassVar[str] = "group_sizes"

    num_learngene: int | None = None
    tailors_per_class: int | None = None
    num_classes: int | None = None
    class_groups: list[list[int]] | dict[str, list[int]] | None = None
    class_gate: list[list[int]] | None = None
    known_classes: list[int] | None = None
    group_sizes: dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LearngenePeftType.LEARNGENE_KIND
        for name, least in (("num_learngene", 0), ("tailors_per_class", 1), ("num_classes", 0)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)
        self._check_classes()
        if self.group_sizes is not None:
            check_pattern("group_sizes", self.group_sizes, "[learngenes, tailors]", length=2)
            for key, size in self.group_sizes.items():
                for number in size:
                    check_integer(f"group_sizes[{key!r}]", number, least=0)
            self.group_sizes = {key: list(size) for key, size in self.group_sizes.items()}

    def _check_classes(self) -> None:
        if self.class_gate is not None:
            self._check_gate()
        if self.class_groups is not None:
            self._check_class_groups()
        if self.known_classes is not None:
            self.known_classes = self._checked_classes("known_classes", self.known_classes, least=0)
        if self.num_classes is not None:
            check_numbers("The gate matrix of num_classes", (self.num_classes + 1, max(1, self.num_units)))

    def _check_class_groups(self) -> None:
        groups: Any = self.class_groups
        if isinstance(groups, list | tuple):
            self.class_groups = [self._checked_classes(f"class_groups[{i}]", group) for i, group in enumerate(groups)]
        elif isinstance(groups, dict) and all(isinstance(key, str) for key in groups):
            named = groups.items()
            self.class_groups = {key: self._checked_classes(f"class_groups[{key!r}]", group) for key, group in named}
        if not self.class_groups or groups is self.class_groups:
            raise ValueError(f"class_groups={groups!r} must be lists of classes, or map names to lists of classes.")

    def _checked_classes(self, name: str, classes: Any, least: int = 1) -> list[int]:
        if not isinstance(classes, list | tuple) or len(classes) < least:
            raise ValueError(f"{name}={classes!r} must be a list of classes.")
        most = MAX_NUMBERS if self.num_classes is None else self.num_classes - 1
        for label in classes:
            check_integer(name, label, least=0, most=most)
        if len(set(classes)) < len(classes):
            raise ValueError(f"{name}={classes!r} holds a class twice.")
        return list(classes)

    def _check_gate(self) -> None:
        rows = self.class_gate
        if self.tailors_per_class is not None or self.class_groups is not None:
            raise ValueError("class_gate says all of it: leave tailors_per_class and class_groups out.")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list | tuple) for row in rows):
            raise ValueError(f"class_gate={rows!r} must be a row of zeros and ones for every class.")
        if len({len(row) for row in rows}) > 1 or not rows[0]:
            raise ValueError(f"class_gate has rows of {sorted({len(row) for row in rows})} tailors: give all as many.")
        for label, row in enumerate(rows):
            for value in row:
                check_integer(f"class_gate[{label}]", value, least=0, most=1)
        if self.num_classes not in (None, len(rows)):
            raise ValueError(f"class_gate has {len(rows)} rows, but num_classes={self.num_classes}.")
        self.num_classes = len(rows)
        self.class_gate = [list(row) for row in rows]

    # Classes

    def resolve_classes(self, num_embeds_ada_norm: int | None) -> None:
        """Take the number of classes from the model's own config, unless it is given.

        Raises:
            ValueError: neither says it, or a class of a group is not among them.
        """
        if self.num_classes is None:
            if num_embeds_ada_norm is None:
                raise ValueError(
                    "num_classes is not given, and the model's config has no num_embeds_ada_norm to say it: give the "
                    "number of classes, or 0 for learngenes only."
                )
            self.num_classes = num_embeds_ada_norm
            try:
                self._check_classes()
            except ValueError:
                self.num_classes = None
                raise

    @property
    def num_units(self) -> int:
        """Among how many tailors are shared out: classes, class groups, or columns of the gate matrix."""
        if self.class_gate is not None:
            return len(self.class_gate[0])
        return len(self.class_groups) if self.class_groups is not None else self._given_num_classes()

    def _given_num_classes(self) -> int:
        if self.num_classes is None:
            raise ValueError("num_classes is not given, and no model has been asked for it yet.")
        return self.num_classes

    def gate_matrix(self) -> tuple[Tensor, Tensor]:
        """Which units of tailors each class opens, bool (num_classes + 1, units), the null class last and empty; and
        which classes are known, bool (num_classes + 1,). (`functional.kind.gate` makes a layer's gate of the rows.)

        Raises:
            ValueError: num_classes is not known yet.
        """
        matrix = torch.zeros(self._given_num_classes() + 1, self.num_units, dtype=torch.bool)
        known = torch.ones(len(matrix), dtype=torch.bool)
        if self.class_gate is not None:
            matrix[:-1] = torch.tensor(self.class_gate, dtype=torch.bool)
        elif self.class_groups is not None:
            for unit, classes in enumerate(_values(self.class_groups)):
                matrix[classes, unit] = True
            known[:-1] = matrix[:-1].any(1)
        else:
            matrix[:-1].fill_diagonal_(True)
        if self.known_classes is not None:
            known[:-1] = False
            known[self.known_classes] = True
        return matrix, known

    def check_addable(self, other: LearngeneConfig) -> None:
        assert isinstance(other, KINDConfig)
        if not all(torch.equal(*pair) for pair in zip(self.gate_matrix(), other.gate_matrix(), strict=True)):
            raise ValueError("Only adapters add up that assign the same classes to tailors in the same way.")

    # Sizes

    def size_of(self, group: Group) -> tuple[int, int]:
        """Learngenes and tailors of each layer of a group.

        Raises:
            ValueError: no components, more learngenes than the smaller side, or tailors that classes cannot share out.
        """
        smaller, units = fine.default_rank(group.shapes), self.num_units
        pattern = self.group_sizes or {}
        if group.key in pattern:
            num_learngene, num_tailors = pattern[group.key]
        else:
            halves = kind.default_sizes(group.shapes) if self.mode == "generate" else (min(8, smaller), 1)
            num_learngene = halves[0] if self.num_learngene is None else self.num_learngene
            check_smaller_side(self, "num_learngene", num_learngene, group)
            each = halves[1] if self.tailors_per_class is None else self.tailors_per_class
            num_tailors = units * (1 if self.class_gate is not None else each)
        if num_tailors % max(1, units) or (num_tailors and not units):
            raise ValueError(
                f"{num_tailors} tailors of {group.key} cannot be shared out among {units} classes, class groups or "
                "columns of class_gate: give a multiple."
            )
        if not num_learngene + num_tailors:
            raise ValueError(f"{group.key} has neither learngenes nor tailors: raise num_learngene or num_classes.")
        check_numbers(f"A factor of {group.key}", (max(fused_shape(group)), num_learngene + num_tailors))
        return num_learngene, num_tailors


def _values(groups: list[list[int]] | dict[str, list[int]]) -> Iterable[list[int]]:
    return groups.values() if isinstance(groups, dict) else groups
