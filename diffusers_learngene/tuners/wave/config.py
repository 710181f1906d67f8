# SPDX-License-Identifier: Apache-2.0
"""Config of WAVE, and the sizes that it stands for in a given model."""

from dataclasses import dataclass
from typing import ClassVar

from ...anatomy.blocks import Group
from ...functional import wave
from ..base_config import LearngeneConfig, check_integer, check_numbers
from ..peft_types import LearngenePeftType


@dataclass
class WAVEConfig(LearngeneConfig):
    """Config of WAVE: every matrix is a tiling, weighted per layer, of a few templates that the layers share.

    Add mode trains about as many numbers as a LoRA of rank 8, but of high rank, and shares most of them.

    Args:
        num_templates: templates of each group. Default in add mode: 8, the rank PEFT users start from. Default in
            generate mode: two layers' worth of numbers (`functional.wave.default_num_templates`).
        template_size: their height and width, or one number for both; no larger than the group's smallest matrix.
            Default in add mode: half the smallest side, at most 64, so that scalers and templates weigh about the
            same. Default in generate mode: half the smallest side, in whole heads.
        template_pattern: sizes by group, `{group: [templates, height, width]}`, instead of the two above. In generate
            mode templates may here be larger than the matrix and are cropped, as for a narrower descendant.
        target_modules: layers to adapt: names or endings of names, or one regular expression, or `"all-linear"`.
            Default: the matrices that recur in the model's repeated blocks (`blocks.default_targets`).
        exclude_modules: layers to leave out: names or endings of names, or one regular expression.
        modules_to_save: modules to train and save in full beside the adapter.
        tensors_to_save: tensors of the model to train, in their place, and save beside the adapter, by full name, in
            which "*" stands for any number: `["blocks.*.norm.weight"]`. (`modules_to_save` trains copies of modules.)
        layers_to_transform: numbers of the blocks to adapt. Default: all.
        layers_pattern: names of the lists of blocks that these numbers count. Default: the model's stacks.
        mode: `"add"`: W + f(templates, scalers), the identity at the start: an adapter of a pre-trained model.
            `"generate"`: W = f(templates, scalers), and W itself is freed: what condensing and descending use.
        share_qkv: whether q, k and v of one attention share templates, as rows of the one matrix that the paper has.
        bias: biases to train: `"none"`, `"all"` of the model, or `"learngene_only"`, those of adapted layers.
        freeze_bank: whether to train the scalers alone, the bank staying as it is (`freeze_bank_` sets it later).
        init_weights: whether `"add"` starts as the identity. False: random scalers, which are of use in tests.

    Raises:
        ValueError: a field has the wrong type or an impossible value.

    Source: WAVE, https://arxiv.org/abs/2406.17503, equation 1.
    """

    pattern_name: ClassVar[str] = "template_pattern"

    num_templates: int | None = None
    template_size: int | tuple[int, int] | None = None
    template_pattern: dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LearngenePeftType.LEARNGENE_WAVE
        if self.num_templates is not None:
            check_integer("num_templates", self.num_templates)
        if isinstance(self.template_size, list | tuple):
            if len(self.template_size) != 2:
                raise ValueError(f"template_size={self.template_size!r} must be one number or (height, width).")
            self.template_size = (self.template_size[0], self.template_size[1])
        if self.template_size is not None:
            check_numbers("template_size", _both(self.template_size))
        if self.template_size is not None and self.num_templates is not None:
            check_numbers("num_templates, template_size", (self.num_templates, *_both(self.template_size)))
        if self.template_pattern is not None:
            pattern = self.template_pattern
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"template_pattern={pattern!r} must map groups to [templates, height, width].")
            for key, size in pattern.items():
                if not isinstance(size, list | tuple) or len(size) != 3:
                    raise ValueError(f"template_pattern[{key!r}]={size!r} must be [templates, height, width].")
                check_numbers(f"template_pattern[{key!r}]", size)
            self.template_pattern = {key: list(size) for key, size in pattern.items()}

    def size_of(self, group: Group) -> tuple[int, int, int]:
        """Number, height and width of the templates of a group.

        Raises:
            ValueError: templates larger than a matrix of the group (they would be cropped, which only a
                `template_pattern` in generate mode means), or more than there are numbers in one.
        """
        pattern = self.template_pattern or {}
        if group.key in pattern:
            num, w1, w2 = pattern[group.key]
        else:
            w1, w2 = self._template_size(group)
            num = self._num_templates(group, (w1, w2))
        if not (group.key in pattern and self.mode == "generate"):
            for matrix in group.matrices:
                if w1 > matrix.shape[0] or w2 > matrix.shape[1]:
                    raise ValueError(
                        f"A template of {w1} x {w2} is larger than the {matrix.shape[0]} x {matrix.shape[1]} weight "
                        f"of {matrix.name}: lower template_size, or leave the layer out with exclude_modules."
                    )
        if num > w1 * w2:
            raise ValueError(
                f"{num} templates of {w1} x {w2} for {group.key} cannot be independent: lower num_templates to "
                f"{w1 * w2} or less, or raise template_size."
            )
        return num, w1, w2

    def _template_size(self, group: Group) -> tuple[int, int]:
        if self.template_size is not None:
            return _both(self.template_size)
        if self.mode == "generate":
            return wave.default_template_size(group.shapes)
        # One layer has 8 m1 m2 / w^2 scalers and the group 8 w^2 numbers in templates: with w = 64 the scalers of a
        # layer of width 4096 weigh as much as the templates, and a narrower model spends less on both.
        side = max(1, min(64, min(min(shape) for shape in group.shapes) // 2))
        return side, side

    def _num_templates(self, group: Group, size: tuple[int, int]) -> int:
        if self.num_templates is not None:
            return self.num_templates
        if self.mode == "generate":
            return wave.default_num_templates(group.shapes, group.num_layers, size)
        tiles = group.num_layers * sum(a * b for a, b in (wave.grid(shape, size) for shape in group.shapes))
        return min(8, tiles, size[0] * size[1])


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)
