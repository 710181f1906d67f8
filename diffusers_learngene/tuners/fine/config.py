# SPDX-License-Identifier: Apache-2.0
"""Config of FINE, and the ranks that it stands for in a given model."""

from dataclasses import dataclass
from typing import ClassVar

from ...anatomy.blocks import Group
from ...functional import fine
from ..base_config import LearngeneConfig, check_integer, check_numbers, check_pattern
from ..peft_types import LearngenePeftType


# Its docstring is completed with the fields of LearngeneConfig.
@dataclass
class FINEConfig(LearngeneConfig):
    """Config of FINE: every matrix is U diag(sigma) V^T, of which the layers share U and V.

    Args:
        r: components of each group; in add mode no more than its smaller side, beyond which one layer gains nothing.
            Default in add mode: 64, or the smaller side if that is less: with 64 in eight layers FINE trains as many
            numbers as a LoRA of rank 8, the rank PEFT users start from, and in a deeper model fewer. Default in
            generate mode: the smaller side (`functional.fine.default_rank`).
        group_ranks: components by group, `{group: r}`, instead of r; here they may be more than the smaller side in
            add mode too, as when adapters are combined. (Not LoRA's `rank_pattern`, whose keys name modules.)

    Raises:
        ValueError: a field has the wrong type or an impossible value.

    Source: FINE, https://arxiv.org/abs/2409.19289.
    """

    pattern_name: ClassVar[str] = "group_ranks"

    r: int | None = None
    group_ranks: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LearngenePeftType.LEARNGENE_FINE
        if self.r is not None:
            check_integer("r", self.r)
        if self.group_ranks is not None:
            check_pattern("group_ranks", self.group_ranks, "ranks")
            for key, rank in self.group_ranks.items():
                check_integer(f"group_ranks[{key!r}]", rank)

    def size_of(self, group: Group) -> tuple[int]:
        """(r,) of a group.

        Raises:
            ValueError: r exceeds the smaller side in add mode, or the numbers in a matrix.
        """
        shape = m1, m2 = fused_shape(group)
        smaller = fine.default_rank(group.shapes)
        pattern = self.group_ranks or {}
        if group.key in pattern:
            rank = pattern[group.key]
        elif self.r is not None:
            rank = self.r
            if self.mode == "add":
                check_smaller_side(self, "r", rank, group)
        else:
            rank = smaller if self.mode == "generate" else min(64, smaller)
        if rank > m1 * m2:
            raise ValueError(
                f"r={rank} components of {m1} x {m2} for {group.key} cannot be independent: lower it to {m1 * m2} or "
                "less."
            )
        check_numbers(f"A factor of {group.key}", (max(shape), rank))
        return (rank,)


def check_smaller_side(config: LearngeneConfig, name: str, value: int, group: Group) -> None:
    """Raise a ValueError if a field asks for more components than the smaller side of the group's fused matrix."""
    (m1, m2), smaller = fused_shape(group), fine.default_rank(group.shapes)
    if value > smaller:
        raise ValueError(
            f"{name}={value} is more than the smaller side of the {m1} x {m2} weight of {group.key}: lower it to "
            f"{smaller}, set the group's own in {config.pattern_name}, or leave it out with exclude_modules."
        )


def fused_shape(group: Group) -> tuple[int, int]:
    """Shape of the one matrix that the matrices of a layer are rows of."""
    return sum(m1 for m1, _ in group.shapes), group.shapes[0][1]
