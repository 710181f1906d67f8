# SPDX-License-Identifier: Apache-2.0
"""Config of WAVE, and the sizes that it stands for in a given model."""

from dataclasses import dataclass
from typing import ClassVar

from ...anatomy.blocks import Group
from ...functional import wave
from ..base_config import LearngeneConfig, check_integer, check_numbers, check_pattern
from ..peft_types import LearngenePeftType


# Its docstring is completed with the fields of LearngeneConfig.
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
            check_pattern("template_pattern", self.template_pattern, "[templates, height, width]", length=3)
            for key, size in self.template_pattern.items():
                check_numbers(f"template_pattern[{key!r}]", size)
            self.template_pattern = {key: list(size) for key, size in self.template_pattern.items()}

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
