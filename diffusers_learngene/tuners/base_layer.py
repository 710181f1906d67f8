# SPDX-License-Identifier: Apache-2.0
"""The layer of every learngene method: merging, modes and layouts; a method adds only a bank's arithmetic.

    add       y = base(x) + scale * x f(bank, scaler)^T
    generate  y = scale * x f(bank, scaler)^T + bias, and the base layer keeps no weight in memory

Either is computed with f(...) built, or factored, whichever takes less arithmetic.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from ..anatomy.blocks import form_of, matrix_to_weight
from .base_sharing import SharingLayer


class LearngeneLayer(SharingLayer):
    """A layer whose weight is one matrix, with adapters that share; arguments as `SharingLayer`."""

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        self._merged_scaling: dict[str, float] = {}
        self._weight_dropped = False

    # f(bank, scaler)

    def _weight(self, adapter: str) -> Tensor:
        """f(bank, scaler), (out, in), times the adapter's scale."""
        scaler = self._scaled(adapter)
        return self.bank(adapter)(scaler, self.shape, self.offsets[adapter]).to(scaler.device)

    def _product(self, adapter: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x f(bank, scaler)^T + bias, (..., in) -> (..., out), f scaled as the adapter is, without building f(...)."""
        return self.bank(adapter)(self._scaled(adapter, x), self.shape, self.offsets[adapter], x, bias).to(x.device)

    def _product_is_cheaper(self, adapter: str, tokens: int) -> bool:
        """Whether `_product` takes less than building the weight and multiplying `tokens` rows with it."""
        return self.bank(adapter).product_is_cheaper(tokens, self.shape)

    def _factored(self, adapter: str, x: Tensor) -> bool:
        """Whether to compute x f(bank, scaler)^T by `_product`."""
        return self._product_is_cheaper(adapter, x.numel() // self.in_features)

    def _scaled(self, adapter: str, x: Tensor | None = None) -> Tensor:
        """The scaler, for the input of `_product` or for a weight, times the adapter's scale: f is linear in it.

        In the dtype of an input, which differs from the adapter's where PEFT is told not to cast inputs.
        """
        scaler, scale = self.scaler(adapter)(), self.scaling[adapter]
        scaler = scaler if x is None else scaler.to(x.dtype)
        return scaler if scale == 1.0 else scaler * scale

    # Base weight

    def drop_weight(self) -> None:
        """Free the base layer's weight: an adapter generates it."""
        base = self.get_base_layer()
        weight = base._parameters.pop("weight", None)
        if weight is not None:
            # Its device and dtype go on being asked for. A buffer that is not saved, because an empty parameter would
            # be looked for by whoever loads a state dict; not on the meta device, because nothing will ever fill it.
            device = torch.device("cpu") if weight.is_meta else weight.device
            base.register_buffer("weight", torch.empty(0, dtype=weight.dtype, device=device), persistent=False)
        self._weight_dropped = True

    def _restore_weight(self, weight: Tensor) -> None:
        """Give the base layer a weight again, in its old place, the first of its parameters."""
        base = self.get_base_layer()
        others = dict(base._parameters)
        base._parameters.clear()
        del base.weight
        base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        base._parameters.update(others)

    def check_has_weight(self, adapters: list[str]) -> None:
        """Raise a RuntimeError unless the layer has a weight with only these adapters on."""
        generators = [adapter for adapter in adapters if self.modes.get(adapter) == "generate"]
        if len(generators) > 1:
            raise RuntimeError(
                f"{' and '.join(generators)} both generate the weight of this layer: activate or merge one of them."
            )
        if self._weight_dropped and not generators:
            raise RuntimeError(
                'This layer has no weight of its own: an adapter with mode="generate" replaced it. Activate that '
                "adapter, or keep its weight with merge_and_unload()."
            )

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight.

        Args:
            safe_merge: look for NaN and infinities before the weight is changed.
            adapter_names: default: the active adapters.

        Raises:
            ValueError: `safe_merge` found some.
            RuntimeError: the layer would have no weight, or two.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        self.check_has_weight(self.merged_adapters + names)
        for name in sorted(names, key=lambda name: self.modes[name] != "generate"):
            with torch.no_grad():
                base, weight = self.get_base_weight(), self.get_delta_weight(name)
                weight = (base + weight if self.modes[name] == "add" else weight).to(base.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self.modes[name] == "generate":
                self._restore_weight(weight)
            else:
                self.set_base_weight(weight)
            self.merged_adapters.append(name)
            self._merged_scaling[name] = self.scaling[name]

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again; a generated weight is dropped."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if any(self.modes[name] == "generate" for name in self.merged_adapters):
            self.drop_weight()
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            now = self.scaling[name]
            self.scaling[name] = self._merged_scaling.pop(name)  # what was added, whatever was set since
            with torch.no_grad():
                base = self.get_base_weight()
                self.set_base_weight((base - self.get_delta_weight(name)).to(base.dtype))
            self.scaling[name] = now

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in its layout; in generate mode, the whole weight."""
        return matrix_to_weight(self._weight(adapter), form_of(self.get_base_layer()))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate the adapter by a LoRA: where it is added."""
        return self.modes.get(adapter_name, "add") == "add"

    # Forward

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """As the base layer; the result has the base layer's dtype.

        Args:
            adapter_names: of a batch in which every sample, along axis 0, has an adapter of its own, or "__base__".
        """
        if self.disable_adapters:
            self.check_has_weight([])
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_by_sample(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._forward(x, self._active(), *args, **kwargs)

    def _forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """With these adapters of the layer on."""
        self.check_has_weight(active)
        if self._weight_dropped:
            active.sort(key=lambda name: self.modes[name] != "generate")
            result = self._generate(active.pop(0), x)
        else:
            result = self.base_layer(x, *args, **kwargs)
            if self.quantization_backend is not None:
                result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter in active:
            result = result + self._delta(adapter, x)
        return result.to(dtype)

    def _forward_by_sample(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name, []).append(row)
        if len(rows) == 1:
            return self._forward(x, [name for name in rows if name in self.scaling], *args, **kwargs)
        parts = [self._forward_rows(x, own, name, *args, **kwargs) for name, own in rows.items()]
        order = [row for own in rows.values() for row in own]
        return torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]

    def _forward_rows(self, x: Tensor, rows: list[int], adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """The samples in these rows, with this adapter if the layer has it."""
        return self._forward(x[rows], [adapter] if adapter in self.scaling else [], *args, **kwargs)

    def _delta(self, adapter: str, x: Tensor) -> Tensor:
        if self._factored(adapter, x):
            return self._product(adapter, self._cast_input_dtype(x, self._adapter_dtype(adapter)))
        return self._linear(x, self._weight(adapter).to(x.dtype), None)

    def _generate(self, adapter: str, x: Tensor) -> Tensor:
        # x has the dtype that the base layer computes in, be it its own, FSDP's or that of a hook on it.
        dtype = x.dtype
        if not self._factored(adapter, x):
            return self._linear(x, self._weight(adapter).to(dtype), self._base_bias(dtype))
        x = self._cast_input_dtype(x, self._adapter_dtype(adapter))
        result = self._product(adapter, x, self._base_bias(x.dtype))
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # on the meta device, asking is an error
            dtype = torch.get_autocast_dtype(x.device.type)
        return result.to(dtype)

    def _adapter_dtype(self, adapter: str) -> torch.dtype:
        return self.scaler(adapter).weight.dtype

    # Layout of the base layer: here, linear layers

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's own operation with another weight, (out, in)."""
        return F.linear(x, weight, bias)

    def _base_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The base layer's bias as a call would have it, though a generated weight calls nothing."""
        base = self.get_base_layer()
        hook = getattr(base, "_hf_hook", None)
        if hook is not None:  # accelerate keeps the bias elsewhere
            hook.pre_forward(base)
        bias = base.bias
        if hook is not None:
            hook.post_forward(base, None)
        # diffusers may keep it in a storage dtype.
        return None if bias is None else bias.to(dtype)

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_bank')}.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
