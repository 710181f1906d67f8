# SPDX-License-Identifier: Apache-2.0
"""WAVE as a PEFT method."""

from torch import nn

from ...anatomy.blocks import Group, Matrix
from ...functional import wave
from ..base_model import LearngeneModel
from ..base_sharing import Scaler
from ..peft_types import LearngenePeftType
from .config import WAVEConfig
from .layer import Conv2d, Linear, TemplateBank, WAVELayer


class WAVEModel(LearngeneModel):
    """A model with WAVE adapters; `get_peft_model(model, WAVEConfig(...))` makes one.

    Source: WAVE, https://arxiv.org/abs/2406.17503.
    """

    prefix = LearngenePeftType.LEARNGENE_WAVE.prefix
    tuner_layer_cls = WAVELayer
    linear_cls = Linear
    conv_cls = Conv2d

    def _create_bank(self, config: WAVEConfig, group: Group) -> TemplateBank:
        bank = TemplateBank(*config.size_of(group))
        bank.init_(group.shapes)
        return bank

    def _create_scaler(self, config: WAVEConfig, bank: TemplateBank, group: Group, matrix: Matrix) -> Scaler:
        scaler = Scaler(bank.size[0], *wave.grid(matrix.shape, bank.size[1:]))
        nn.init.normal_(scaler.weight)
        return scaler
