# SPDX-License-Identifier: Apache-2.0
"""FINE as a PEFT method: U and V that layers share, and each layer's sigma; and the LoRA that it is."""

from .config import FINEConfig
from .conversion import save_as_lora, to_lora
from .layer import FactorBank, FINELayer
from .model import FINEModel


__all__ = ["FINEConfig", "FINELayer", "FINEModel", "FactorBank", "save_as_lora", "to_lora"]
