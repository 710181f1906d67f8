# SPDX-License-Identifier: Apache-2.0
"""Layers with WAVE adapters: templates in the bank, weight scalers in the layer.

W  =  sum_t  kron(S[t], T[t])
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...functional import wave
from ..base_conv import PointwiseConv
from ..base_layer import LearngeneLayer
from ..base_sharing import Bank, Scope


class TemplateBank(Bank):
    """The templates (N, w1, w2) of one group, as one parameter; scalers are (N, a, b)."""

    component_axis = 0

    def __init__(self, num_templates: int, height: int, width: int) -> None:
        super().__init__()
        self.size: tuple[int, int, int] = (num_templates, height, width)
        self.templates = nn.Parameter(torch.empty(self.size))

    @torch.no_grad()
    def init_(self, shapes: Sequence[Sequence[int]]) -> None:
        """Draw the templates for matrices of these shapes; on the meta device there are none to draw."""
        if not self.templates.is_meta:
            self.templates.copy_(wave.random_init(shapes, self.size[0], self.size[1:]))

    # Every row of the fused matrix has the same templates, whatever its offset.

    def _weight(self, scaler: Tensor, shape: Sequence[int], offset: int) -> Tensor:
        return wave.compose(scaler, self.templates.to(scaler), shape=shape)

    def _product(self, x: Tensor, scaler: Tensor, shape: Sequence[int], offset: int, bias: Tensor | None) -> Tensor:
        return wave.apply(x, scaler, self.templates.to(scaler), bias, shape=shape)

    def product_is_cheaper(self, tokens: int, shape: Sequence[int]) -> bool:
        return wave.apply_is_cheaper(tokens, self.size, shape)

    def pattern(self, *parts: int) -> list[int]:
        return [*parts, *self.size[1:]]

    def placed(self, rows: Sequence[tuple[int, int, int]], total: int) -> dict[str, Tensor]:
        return {"templates": self.templates.detach()}

    def extra_repr(self) -> str:
        num, height, width = self.size
        return f"{num} templates, {height} x {width}"


class WAVELayer(LearngeneLayer):
    """WAVE for any layout."""

    adapter_layer_names = ("learngene_wave_bank", "learngene_wave_scaler")
    bank_scope: Scope = "group"
    scaler_scope: Scope = "matrix"


class Linear(WAVELayer):
    """nn.Linear, quantised or not, and transformers' Conv1D. (PEFT's "all-linear" looks for this name.)"""


class Conv2d(PointwiseConv, WAVELayer):
    """1x1 nn.Conv2d."""
