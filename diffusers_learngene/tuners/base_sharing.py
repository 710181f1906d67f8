# SPDX-License-Identifier: Apache-2.0
"""Who shares what: the adapters of a layer, and which of their tensors are the layer's own.

An adapter has two parts. The *bank* is what the learngene is made of; the *scaler* weighs it. A method says how far
each is shared: over the matrix, over the layer (q, k and v of one attention, rows of one fused matrix), or over the
group (that matrix in all layers).

            bank       scaler
    WAVE    group      matrix
    FINE    group      layer
    KIND    layer      layer

The first layer that uses a part registers it as a module, so that it is counted, saved and moved once; the others
refer to that module (not to its tensors, which loading and casting replace) through a plain dict, which state dicts do
not see and which deepcopy and pickle follow. Both are read by calling them, so that the hooks of accelerate and FSDP
fire.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ..anatomy.blocks import Group, Matrix, matrix_shape
from .base_config import LearngeneConfig


Scope = Literal["matrix", "layer", "group"]


def share_key(scope: Scope, group: Group, matrix: Matrix) -> str:
    """Name of what `matrix` shares: the group's, which over a layer has the layer's number, or the matrix's own."""
    if scope == "matrix":
        return matrix.name
    return group.key if scope == "group" else group.key.replace("*", str(matrix.layer), 1)


class Scaler(nn.Module):
    """The scaler as one tensor, `weight`, behind a call."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.weight


class Bank(nn.Module):
    """The tensors of a bank, and the products with them.

    These are taken in here, rather than where the layer is, because FSDP has the tensors gathered only during a call:
    a method says what `_weight` and `_product` are, and layers call the bank.
    """

    # Along which axis the tensors list the components that a scaler weighs; a scaler lists them along its first.
    component_axis: int

    def forward(
        self,
        scaler: Tensor,
        shape: Sequence[int],
        offset: int,
        x: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """W (m1, m2) of a scaler and a shape (m1, m2), or x W^T + bias (..., m1) of x (..., m2).

        The scaler says on which device and in which dtype.

        Args:
            offset: rows before W in the fused matrix of its layer.
        """
        if x is None:
            return self._weight(scaler, shape, offset)
        return self._product(x, scaler, shape, offset, bias)

    def _weight(self, scaler: Tensor, shape: Sequence[int], offset: int) -> Tensor:
        """W."""
        raise NotImplementedError

    def _product(self, x: Tensor, scaler: Tensor, shape: Sequence[int], offset: int, bias: Tensor | None) -> Tensor:
        """x W^T + bias, without W."""
        raise NotImplementedError

    def product_is_cheaper(self, tokens: int, shape: Sequence[int]) -> bool:
        """Whether x W^T takes less without W than building W and multiplying `tokens` rows with it."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[int, ...]:
        """How many components there are of every kind, in their order; of one kind unless a method says otherwise."""
        return (next(self.parameters()).shape[self.component_axis],)

    def pattern(self, *parts: int) -> Any:
        """What a config's pattern says for a bank like this one with so many components of every kind."""
        raise NotImplementedError

    def placed(self, rows: Sequence[tuple[int, int, int]], total: int) -> dict[str, Tensor]:
        """The tensors for a fused matrix of `total` rows, where `rows` are (offset here, offset there, how many)."""
        raise NotImplementedError


class SharingLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight is one matrix, with adapters that share. A method sets the first three attributes.

    Args:
        base_layer: nn.Linear (quantised or not), transformers' Conv1D, or a 1x1 nn.Conv2d; may be wrapped already.
        quantization: PEFT's `get_quantization_kwargs(...)` of the model.
    """

    # The bank's and the scaler's attribute, in this order; both start with the prefix of the method.
    adapter_layer_names: tuple[str, ...]
    bank_scope: Scope
    scaler_scope: Scope
    # By adapter, none of it in the state dict: [bank], [scaler], name of what the bank is shared over, rows before
    # this layer in the fused matrix, factor, "add" or "generate".
    other_param_names: tuple[str, ...] = ("bank_refs", "scaler_refs", "bank_keys", "offsets", "scaling", "modes")

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
        self.bank_refs: dict[str, list[Bank]] = {}
        self.scaler_refs: dict[str, list[Scaler]] = {}
        self.bank_keys: dict[str, str] = {}
        self.offsets: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.modes: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` and diffusers' hooks set it

    @property
    def banks(self) -> nn.ModuleDict:
        """The banks that this layer owns, by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def scalers(self) -> nn.ModuleDict:
        """The scalers that this layer owns, by adapter."""
        return getattr(self, self.adapter_layer_names[1])

    @property
    def r(self) -> dict[str, float]:
        """Adapters of the layer; diffusers counts them under this name to number the next."""
        return self.scaling

    def bank(self, adapter: str) -> Bank:
        """The bank of an adapter, whoever owns it."""
        return self.bank_refs[adapter][0]

    def scaler(self, adapter: str) -> Scaler:
        """The scaler of an adapter, whoever owns it."""
        return self.scaler_refs[adapter][0]

    def update_layer(
        self,
        adapter: str,
        bank: Bank,
        scaler: Scaler,
        config: LearngeneConfig,
        *,
        bank_key: str,
        offset: int,
        owns_bank: bool,
        owns_scaler: bool,
    ) -> None:
        """Add an adapter; the tuner has checked that it fits."""
        if owns_bank:
            self.banks[adapter] = bank
        if owns_scaler:
            self.scalers[adapter] = scaler
        self.bank_refs[adapter] = [bank]
        self.scaler_refs[adapter] = [scaler]
        self.bank_keys[adapter] = bank_key
        self.offsets[adapter] = offset
        self.scaling[adapter] = 1.0
        self.modes[adapter] = config.mode
        if config.freeze_bank:
            self.frozen_peft_weight_names[adapter] = self.adapter_layer_names[:1]
        # To the base layer's device and dtype, as in PEFT, which then raises half precision to fp32 if asked. But not
        # to 8 bits, in which diffusers stores weights and nothing can be computed.
        own = self.weight.dtype.itemsize == 1
        (type(self) if own else BaseTunerLayer)._move_adapter_to_device_of_base_layer(self, adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move only: PEFT calls this after loading as well, where its cast would round the weights of the file."""
        device = self.weight.device if device is None else device
        if device.type == "meta":
            return
        for modules in (self.banks, self.scalers):
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                modules[adapter_name].to(device)

    def _get_available_adapters(self) -> set[str]:
        """PEFT's status report looks for modules, of which a layer that owns nothing has none."""
        return set(self.scaling)

    def _active(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.scaling]

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
