# SPDX-License-Identifier: Apache-2.0
"""1x1 convolutions (the FFN of Sana): the same matrix over channels, in another layout."""

import torch.nn.functional as F
from torch import Tensor

from .base_layer import LearngeneLayer


class PointwiseConv(LearngeneLayer):
    """Mixin, to be put before a method's own layer: 1x1 nn.Conv2d with any stride and padding."""

    def _product_is_cheaper(self, adapter: str, tokens: int) -> bool:
        base = self.get_base_layer()
        plain = base.stride == (1, 1) and base.padding in ((0, 0), "valid", "same")
        return plain and super()._product_is_cheaper(adapter, tokens)

    def _product(self, adapter: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super()._product(adapter, self._read(x).movedim(-3, -1), bias).movedim(-1, -3)

    def _read(self, x: Tensor) -> Tensor:
        """The places of x that the kernel reads, in their order."""
        base = self.get_base_layer()
        if any(base._reversed_padding_repeated_twice):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        return x[..., :: base.stride[0], :: base.stride[1]]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.get_base_layer()._conv_forward(x, weight[:, :, None, None], bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts two-dimensional weights only
