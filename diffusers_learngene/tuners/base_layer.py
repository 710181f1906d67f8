# SPDX-License-Identifier: Apache-2.0
"""The layer of every learngene method: merging, scaling, modes and layouts; a method adds only its arithmetic.

An adapter of a layer has two parts. The *bank* holds what the layers of a group share. It is a module that the first
layer of the group registers, so that it is counted, saved and moved once; the other layers refer to that module (not
to its tensors, which loading and casting replace) through a plain dict, which state dicts do not see and which
deepcopy and pickle follow. The *scaler* holds what is the layer's own. Both are read by calling them, so that the
hooks of accelerate and FSDP fire.

    add       y = base(x) + scale * x f(bank, scaler)^T
    generate  y = scale * x f(bank, scaler)^T + bias, and the base layer keeps no weight in memory

Either is computed with f(...) built, or factored, whichever takes less arithmetic.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..blocks import matrix_shape, matrix_to_weight
from .base_config import LearngeneConfig


class Scaler(nn.Module):
    """One tensor of a layer's own, `weight`, behind a call."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.weight


class LearngeneLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight is one matrix, with adapters that share. A method sets `adapter_layer_names`.

    Args:
        base_layer: nn.Linear (quantised or not), transformers' Conv1D, or a 1x1 nn.Conv2d; may be wrapped already.
        quantization: PEFT's `get_quantization_kwargs(...)` of the model.
    """

    # The bank's and the scaler's attribute, in this order; both start with the prefix of the method.
    adapter_layer_names: tuple[str, ...]
    # By adapter, none of it in the state dict: [bank], name of the group, factor, "add" or "generate".
    other_param_names: tuple[str, ...] = ("bank_refs", "group_keys", "scaling", "modes")

    if TYPE_CHECKING:  # PEFT's attributes and methods, which it does not type

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = matrix_shape(base_layer)
        if shape is None:
            raise TypeError(f"The weight of {type(base_layer).__name__} is not one matrix.")
        self.out_features, self.in_features = self.shape = shape
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **(quantization or {}))
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.bank_refs: dict[str, list[nn.Module]] = {}
        self.group_keys: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.modes: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self._weight_dropped = False
        self._disable_adapters = False

    # What a method adds

    def _weight(self, adapter: str) -> Tensor:
        """f(bank, scaler), (out, in), times the adapter's scale."""
        raise NotImplementedError

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        """x f(bank, scaler)^T, (..., in) -> (..., out), times the adapter's scale, without building f(...)."""
        raise NotImplementedError

    def _product_is_cheaper(self, adapter: str, tokens: int) -> bool:
        """Whether `_product` takes less than building the weight and multiplying `tokens` rows with it."""
        raise NotImplementedError

    # Adapters

    @property
    def banks(self) -> nn.ModuleDict:
        """The banks that this layer owns, by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def scalers(self) -> nn.ModuleDict:
        """The layer's own part of every adapter."""
        return getattr(self, self.adapter_layer_names[1])

    @property
    def r(self) -> dict[str, float]:
        """Adapters of the layer; diffusers counts them under this name to number the next."""
        return self.scaling

    def bank(self, adapter: str) -> nn.Module:
        """The bank that the layer shares with its group."""
        return self.bank_refs[adapter][0]

    def update_layer(
        self,
        adapter: str,
        group_key: str,
        bank: nn.Module,
        scaler: nn.Module,
        config: LearngeneConfig,
        *,
        owns_bank: bool,
    ) -> None:
        """Add an adapter; the tuner has checked that it fits."""
        self.scalers[adapter] = scaler
        if owns_bank:
            self.banks[adapter] = bank
        self.bank_refs[adapter] = [bank]
        self.group_keys[adapter] = group_key
        self.scaling[adapter] = 1.0
        self.modes[adapter] = config.mode
        # To the base layer's device and dtype, as in PEFT, which then raises half precision to fp32 if it is to.
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter)
        if config.mode == "generate":
            self._drop_weight()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move only: PEFT calls this after loading as well, where its cast would round the weights of the file."""
        device = self.weight.device if device is None else device
        if device.type == "meta":
            return
        for modules in (self.banks, self.scalers):
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                modules[adapter_name].to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's factor; adapters that the layer does not have are passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters."""
        for adapter in self._active():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters; None sets them to 1."""
        for adapter in self._active():
            self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

    def _active(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.scaling]

    # Base weight

    def _drop_weight(self) -> None:
        base = self.get_base_layer()
        weight = base.weight
        # Not setattr: PEFT may be injecting under a patch that sends every new parameter to the meta device.
        empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
        base._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        self._weight_dropped = True

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
            self.set_base_weight(weight)
            self.merged_adapters.append(name)
            self._merged_scaling[name] = self.scaling[name]

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again; a generated weight is dropped."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if any(self.modes[name] == "generate" for name in self.merged_adapters):
            self._drop_weight()
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
        return matrix_to_weight(self._weight(adapter), self.get_base_layer())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate the adapter by a LoRA: where it is added."""
        return self.modes.get(adapter_name, "add") == "add"

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer; the result has the base layer's dtype."""
        if self.disable_adapters:
            self.check_has_weight([])
            if self.merged:
                self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self._active()
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

    def _delta(self, adapter: str, x: Tensor) -> Tensor:
        if self._product_is_cheaper(adapter, x.numel() // self.in_features):
            return self._product(adapter, self._cast_input_dtype(x, self._adapter_dtype(adapter)))
        return self._linear(x, self._weight(adapter).to(x.dtype), None)

    def _generate(self, adapter: str, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        dtype = base.weight.dtype
        if not self._product_is_cheaper(adapter, x.numel() // self.in_features):
            return self._linear(x, self._weight(adapter).to(dtype), self._base_bias())
        result = self._product(adapter, self._cast_input_dtype(x, self._adapter_dtype(adapter)))
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        bias = self._bias()
        return (result if bias is None else result + bias).to(dtype)

    def _adapter_dtype(self, adapter: str) -> torch.dtype:
        return next(self.scalers[adapter].parameters()).dtype

    # Layout of the base layer: here, linear layers

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's own operation with another weight, (out, in)."""
        return F.linear(x, weight, bias)

    def _base_bias(self) -> Tensor | None:
        base = self.get_base_layer()
        hook = getattr(base, "_hf_hook", None)
        if hook is None:
            return base.bias
        # accelerate keeps the bias elsewhere until the base layer is called, which a generated weight does not do.
        hook.pre_forward(base)
        bias = base.bias
        hook.post_forward(base, None)
        return bias

    def _bias(self) -> Tensor | None:
        """The base layer's bias in a shape that adds to the result."""
        return self._base_bias()

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_bank')}.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
