# SPDX-License-Identifier: Apache-2.0
"""Config of FINE, and the ranks that it stands for in a given model."""

from dataclasses import dataclass
from typing import ClassVar

from ...anatomy.blocks import Group
from ...functional import fine
from ..base_config import LearngeneConfig, check_integer, check_numbers
from ..peft_types import LearngenePeftType


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
        target_modules: layers to adapt: names or endings of names, or one regular expression, or `"all-linear"`.
            Default: the matrices that recur in the model's repeated blocks (`blocks.default_targets`).
        exclude_modules: layers to leave out: names or endings of names, or one regular expression.
        modules_to_save: modules to train and save in full beside the adapter.
        tensors_to_save: tensors of the model to train, in their place, and save beside the adapter, by full name, in
            which "*" stands for any number: `["blocks.*.norm.weight"]`. (`modules_to_save` trains copies of modules.)
        layers_to_transform: numbers of the blocks to adapt. Default: all.
        layers_pattern: names of the lists of blocks that these numbers count. Default: the model's stacks.
        mode: `"add"`: W + U diag(sigma) V^T, the identity at the start: an adapter of a pre-trained model.
            `"generate"`: W = U diag(sigma) V^T, and W itself is freed: what condensing and descending use.
        share_qkv: whether q, k and v of one attention are rows of one matrix, as in the paper: one V and one sigma.
        bias: biases to train: `"none"`, `"all"` of the model, or `"learngene_only"`, those of adapted layers.
        freeze_bank: whether to train the scalers alone, the bank staying as it is (`freeze_bank_` sets it later).
        init_weights: whether `"add"` starts as the identity. False: random sigma, which is of use in tests.

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
            pattern = self.group_ranks
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"group_ranks={pattern!r} must map groups to ranks.")
            for key, rank in pattern.items():
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
            if self.mode == "add" and rank > smaller:
                raise ValueError(
                    f"r={rank} is more than the smaller side of the {m1} x {m2} weight of {group.key}: lower r to "
                    f"{smaller}, set the group's own in group_ranks, or leave it out with exclude_modules."
                )
        else:
            rank = smaller if self.mode == "generate" else min(64, smaller)
        if rank > m1 * m2:
            raise ValueError(
                f"r={rank} components of {m1} x {m2} for {group.key} cannot be independent: lower it to {m1 * m2} or "
                "less."
            )
        check_numbers(f"A factor of {group.key}", (max(shape), rank))
        return (rank,)


def fused_shape(group: Group) -> tuple[int, int]:
    """Shape of the one matrix that the matrices of a layer are rows of."""
    return sum(m1 for m1, _ in group.shapes), group.shapes[0][1]
