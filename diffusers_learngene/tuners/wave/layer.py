# SPDX-License-Identifier: Apache-2.0
"""Layers with WAVE adapters: templates in the bank, weight scalers in the layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import wave
from ..base_conv import PointwiseConv
from ..base_layer import LearngeneLayer


class TemplateBank(nn.Module):
    """The templates (N, w1, w2) of one group, as one parameter.

    The products are taken in here, rather than where the layer is, because FSDP has the templates gathered only during
    this call.
    """

    def __init__(self, num_templates: int, height: int, width: int) -> None:
        super().__init__()
        self.size: tuple[int, int, int] = (num_templates, height, width)
        self.templates = nn.Parameter(torch.empty(self.size))

    def forward(self, scaler: Tensor, shape: Sequence[int], x: Tensor | None = None) -> Tensor:
        """W (m1, m2) of a scaler (N, a, b) and a shape (m1, m2), or x W^T (..., m1) of x (..., m2)."""
        templates = self.templates.to(scaler.device)
        if x is None:
            return wave.compose(scaler, templates, shape=shape)
        return wave.apply(x, scaler, templates, shape=shape)

    def extra_repr(self) -> str:
        num, height, width = self.size
        return f"{num} templates, {height} x {width}"


class WAVELayer(LearngeneLayer):
    """The arithmetic of WAVE for any layout."""

    adapter_layer_names = ("learngene_wave_bank", "learngene_wave_scaler")

    def _weight(self, adapter: str) -> Tensor:
        scaler = self._scaler(adapter)
        return self.bank(adapter)(scaler, self.shape).to(scaler.device)

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        return self.bank(adapter)(self._scaler(adapter), self.shape, x).to(x.device)

    def _product_is_cheaper(self, adapter: str, tokens: int) -> bool:
        bank: Any = self.bank(adapter)
        return wave.apply_is_cheaper(tokens, bank.size, self.shape)

    def _scaler(self, adapter: str) -> Tensor:
        scaler, scale = self.scalers[adapter](), self.scaling[adapter]
        return scaler if scale == 1.0 else scaler * scale


class Linear(WAVELayer):
    """nn.Linear, quantised or not, and transformers' Conv1D. (PEFT's "all-linear" looks for this name.)"""


class Conv2d(PointwiseConv, WAVELayer):
    """1x1 nn.Conv2d."""
