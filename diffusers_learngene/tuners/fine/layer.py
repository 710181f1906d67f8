# SPDX-License-Identifier: Apache-2.0
"""Layers with FINE adapters: U and V in the bank, one sigma for the matrices of a layer that are fused.

W  =  U[rows] diag(sigma) V^T
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...functional import fine
from ..base_conv import PointwiseConv
from ..base_layer import LearngeneLayer
from ..base_sharing import Bank, Scope


class FactorBank(Bank):
    """U (m1, r) and V (m2, r) of one group, where m1 counts the rows of the fused matrix; sigma is (r,)."""

    component_axis = 1

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.shape, self.rank = (rows, columns), rank
        self.u = nn.Parameter(torch.empty(rows, rank))
        self.v = nn.Parameter(torch.empty(columns, rank))

    @torch.no_grad()
    def init_(self) -> None:
        """Draw the factors; on the meta device there are none to draw."""
        if not self.u.is_meta:
            for factor, value in zip((self.u, self.v), fine.random_factors(self.shape, self.rank), strict=True):
                factor.copy_(value)

    def _factors(self, scaler: Tensor, shape: Sequence[int], offset: int) -> tuple[Tensor, Tensor]:
        return self.u[offset : offset + shape[0]].to(scaler), self.v.to(scaler)

    def _weight(self, scaler: Tensor, shape: Sequence[int], offset: int) -> Tensor:
        return fine.compose(scaler, *self._factors(scaler, shape, offset))

    def _product(self, x: Tensor, scaler: Tensor, shape: Sequence[int], offset: int, bias: Tensor | None) -> Tensor:
        return fine.apply(x, scaler, *self._factors(scaler, shape, offset), bias)

    def product_is_cheaper(self, tokens: int, shape: Sequence[int]) -> bool:
        return fine.apply_is_cheaper(tokens, self.rank, shape)

    def pattern(self, *parts: int) -> int:
        return parts[0]

    def placed(self, rows: Sequence[tuple[int, int, int]], total: int) -> dict[str, Tensor]:
        u = self.u.new_zeros(total, self.rank)
        for here, there, count in rows:
            u[there : there + count] = self.u.detach()[here : here + count]
        return {"u": u, "v": self.v.detach()}

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, rank {self.rank}"


class FINELayer(LearngeneLayer):
    """FINE for any layout."""

    adapter_layer_names = ("learngene_fine_bank", "learngene_fine_sigma")
    bank_scope: Scope = "group"
    scaler_scope: Scope = "layer"


class Linear(FINELayer):
    """nn.Linear, quantised or not, and transformers' Conv1D. (PEFT's "all-linear" looks for this name.)"""


class Conv2d(PointwiseConv, FINELayer):
    """1x1 nn.Conv2d."""
