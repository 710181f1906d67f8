# SPDX-License-Identifier: Apache-2.0
"""FINE as a PEFT method."""

from peft import LoraConfig
from torch import Tensor, nn

from ...anatomy.blocks import Group, Matrix
from ...functional import fine
from ..base_model import LearngeneModel
from ..base_sharing import Scaler
from ..peft_types import LearngenePeftType
from .config import FINEConfig, fused_shape
from .conversion import to_lora
from .layer import Conv2d, FactorBank, FINELayer, Linear


class FINEModel(LearngeneModel):
    """A model with FINE adapters; `get_peft_model(model, FINEConfig(...))` makes one.

    Source: FINE, https://arxiv.org/abs/2409.19289.
    """

    prefix = LearngenePeftType.LEARNGENE_FINE.prefix
    tuner_layer_cls = FINELayer
    linear_cls = Linear
    conv_cls = Conv2d

    def _create_bank(self, config: FINEConfig, group: Group) -> FactorBank:
        bank = FactorBank(*fused_shape(group), *config.size_of(group))
        bank.init_()
        return bank

    def _create_scaler(self, config: FINEConfig, bank: FactorBank, group: Group, matrix: Matrix) -> Scaler:
        sigma = Scaler(bank.rank)
        nn.init.normal_(sigma.weight, std=fine.sigma_std(bank.shape, bank.rank))
        return sigma

    def to_lora(self, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
        """The LoRA that an added adapter is, exactly: `conversion.to_lora` of this model."""
        return to_lora(self.model, adapter_name)
