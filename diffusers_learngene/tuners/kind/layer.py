# SPDX-License-Identifier: Apache-2.0
"""Layers with KIND adapters: U and V of every layer its own, sigma, and the gate that opens tailors by class.

W(c)  =  U[rows] diag(sigma * g(c)) V^T
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import fine, kind
from ..base_conv import PointwiseConv
from ..base_layer import LearngeneLayer
from ..base_sharing import Scope
from ..fine.layer import FactorBank
from .gate import ClassTable, Gate, GateState


class TailoredBank(FactorBank):
    """FINE's bank for one layer, of which the first components are learngenes and the rest tailors."""

    def __init__(self, rows: int, columns: int, num_learngene: int, num_tailors: int) -> None:
        super().__init__(rows, columns, num_learngene + num_tailors)
        self.num_learngene, self.num_tailors = num_learngene, num_tailors
        self.users = 0  # layers: three for q, k and v
        self.gate = GateState()

    def _product(self, x: Tensor, scaler: Tensor, shape: Sequence[int], offset: int, bias: Tensor | None) -> Tensor:
        """As FINE's, except that layers of the same input have x V computed once."""
        gate = self.gate.gate
        if gate is None:
            return super()._product(x, scaler, shape, offset, bias)
        u, v = self._factors(scaler, shape, offset)
        return fine.expand(gate.project(x, self, v, self.users) * scaler, u, bias)

    @property
    def parts(self) -> tuple[int, ...]:
        return self.num_learngene, self.num_tailors

    def pattern(self, *parts: int) -> list[int]:  # type: ignore[override]
        return list(parts)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.num_learngene} learngenes, {self.num_tailors} tailors"


class KINDLayer(LearngeneLayer):
    """KIND for any layout.

    A batch of many classes is computed with the factors, as no one weight fits it. A weight is that of one class:
    there is one if the adapter has no tailors, if it knows one class, or inside `class_gate(model, id)`.
    """

    adapter_layer_names = ("learngene_kind_bank", "learngene_kind_sigma", "learngene_kind_classes")
    other_param_names = (*LearngeneLayer.other_param_names, "table_refs")
    bank_scope: Scope = "layer"
    scaler_scope: Scope = "layer"

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        self.gate = GateState()
        self.table_refs: dict[str, list[ClassTable]] = {}
        self._merged_units: dict[str, Tensor] = {}

    def attach(self, adapter: str, gate: GateState, table: ClassTable, owns_table: bool) -> None:
        """Say where classes are read, and what they open. One layer of the model registers the table.

        (After the injection, in which PEFT moves all that is registered to the base layer's device, be it meta.)
        """
        self.gate = gate
        self.table_refs[adapter] = [table]
        bank: Any = self.bank(adapter)
        bank.gate = gate
        bank.users += 1
        if owns_table:
            self.learngene_kind_classes[adapter] = table
            self._move_adapter_to_device_of_base_layer(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        device = self.weight.device if device is None else device
        if adapter_name in self.learngene_kind_classes and device.type != "meta":
            self.learngene_kind_classes[adapter_name].to(device)

    # The gate

    def _is_gated(self, adapter: str) -> bool:
        bank: Any = self.bank(adapter)
        return bank.num_tailors > 0

    def _one_class(self, adapter: str) -> Tensor | None:
        """Open units (n,) of the only class that there is now; None if there may be several."""
        if adapter in self._merged_units:
            return self._merged_units[adapter]
        table, gate = self.table_refs[adapter][0], self.gate.gate
        if gate is not None and isinstance(gate.classes, int):
            return gate.units(table)
        return None if table.only_class is None else table(table.only_class)

    def _units(self, adapter: str, x: Tensor) -> Tensor:
        """Open units (B, n) of the samples of an input, or (n,) for one class."""
        gate = self._given_gate()
        units = gate.units(self.table_refs[adapter][0])
        if units.dim() == 2:
            gate.check_size(len(units), len(x))
        return units

    def _given_gate(self) -> Gate:
        gate = self.gate.gate
        if gate is None:
            raise RuntimeError(
                "The KIND adapter has tailors, but nothing says which class the samples have: give the model its "
                "class_labels, or call it inside `with class_gate(model, ids):`."
            )
        return gate

    def _scaled(self, adapter: str, x: Tensor | None = None) -> Tensor:
        sigma = super()._scaled(adapter, x)
        if not self._is_gated(adapter):
            return sigma
        units = self._one_class(adapter) if x is None else self._units(adapter, x)
        if units is None:
            raise RuntimeError(
                f"The weight of adapter {adapter!r} depends on the class: take it, or merge, inside `with "
                "class_gate(model, id):` of one class."
            )
        bank: Any = self.bank(adapter)
        gated = sigma * kind.gate(units.to(sigma.device), bank.num_learngene, bank.num_tailors)
        return gated if x is None or gated.dim() == 1 else kind.spread(gated, x.dim()).to(x.device)

    def _factored(self, adapter: str, x: Tensor) -> bool:
        if self._is_gated(adapter) and not isinstance(self._given_gate().classes, int):
            return True
        return super()._factored(adapter, x)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `LearngeneLayer.merge`, for one class.

        Raises:
            RuntimeError: there may be several classes, too.
        """
        before = set(self.merged_adapters)
        super().merge(safe_merge, adapter_names)
        for adapter in set(self.merged_adapters) - before:
            if self._is_gated(adapter):
                units = self._one_class(adapter)
                assert units is not None
                self._merged_units[adapter] = units

    def unmerge(self) -> None:
        """As `LearngeneLayer.unmerge`; what is taken out is the class that was merged."""
        super().unmerge()
        self._merged_units.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is one added weight: not if it depends on the class."""
        one = adapter_name not in self.table_refs or not self._is_gated(adapter_name)
        return super().supports_lora_conversion(adapter_name) and (one or self._one_class(adapter_name) is not None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer, for the classes of the gate.

        Raises:
            RuntimeError: there is no gate.
            ValueError: it has another number of rows, or classes that are unknown, or not merged.
        """
        if self._merged_units and not self.disable_adapters:
            self._check_merged(x)
        return super().forward(x, *args, **kwargs)

    def _forward_rows(self, x: Tensor, rows: list[int], adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """As `LearngeneLayer._forward_rows`, with the classes of these samples alone: each adapter knows its own."""
        whole = self.gate.gate
        if whole is None:
            return super()._forward_rows(x, rows, adapter, *args, **kwargs)
        with self.gate.pushed(whole.of_rows(rows, len(x))):
            return super()._forward_rows(x, rows, adapter, *args, **kwargs)

    def _check_merged(self, x: Tensor) -> None:
        """Raise if the gate asks for another class than the one that is merged. (No gate asks for nothing.)"""
        for adapter, merged in self._merged_units.items():
            if self.gate.gate is not None:
                same = (self._units(adapter, x) == merged.to(x.device)).all()
                if torch.compiler.is_compiling() or x.device.type not in ("cpu", "meta"):
                    torch._assert_async(same, "another class than the one whose weights are merged")
                elif not x.is_meta and not same:
                    raise ValueError(f"Of adapter {adapter!r} one class is merged, but the batch has others: unmerge.")


class Linear(KINDLayer):
    """nn.Linear, quantised or not, and transformers' Conv1D. (PEFT's "all-linear" looks for this name.)"""


class Conv2d(PointwiseConv, KINDLayer):
    """1x1 nn.Conv2d."""
