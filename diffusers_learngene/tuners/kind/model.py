# SPDX-License-Identifier: Apache-2.0
"""KIND as a PEFT method."""

from typing import Any

from peft import PeftConfig
from torch import nn

from ...anatomy.blocks import Group, Matrix
from ...functional import fine
from ..base_model import LearngeneModel
from ..base_sharing import Scaler
from ..fine.config import fused_shape
from ..peft_types import LearngenePeftType
from . import gate
from .config import KINDConfig
from .layer import Conv2d, KINDLayer, Linear, TailoredBank


class KINDModel(LearngeneModel):
    """A model with KIND adapters; `get_peft_model(model, KINDConfig(...))` makes one.

    Source: KIND, https://arxiv.org/abs/2408.07337.
    """

    prefix = LearngenePeftType.LEARNGENE_KIND.prefix
    tuner_layer_cls = KINDLayer
    linear_cls = Linear
    conv_cls = Conv2d

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        peft_config.resolve_classes(model_config.get("num_embeds_ada_norm"))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        self._made = [gate.ClassTable(peft_config)]  # a list, because a module would be registered here

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [layer for layer in model.modules() if isinstance(layer, KINDLayer) and adapter_name in layer.scaling]
        for layer in layers:
            layer.attach(adapter_name, gate.state_of(model), self._made[0], owns_table=layer is layers[0])
        self._made = []
        gate.install(model)

    def _create_bank(self, config: KINDConfig, group: Group) -> TailoredBank:
        bank = TailoredBank(*fused_shape(group), *config.size_of(group))
        bank.init_()
        return bank

    def _create_scaler(self, config: KINDConfig, bank: TailoredBank, group: Group, matrix: Matrix) -> Scaler:
        sigma = Scaler(bank.rank)
        # What one class sees has Xavier's variance, on average.
        open_components = bank.num_learngene + bank.num_tailors * self._made[0].share
        nn.init.normal_(sigma.weight, std=fine.sigma_std(bank.shape, max(1, round(open_components))))
        return sigma

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the model's last KIND adapter takes the hooks with it that read labels."""
        super().delete_adapter(adapter_name)
        if not any(isinstance(config, KINDConfig) for config in self.peft_config.values()):
            gate.remove(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        gate.remove(model)
        return model
