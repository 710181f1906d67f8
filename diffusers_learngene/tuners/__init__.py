# SPDX-License-Identifier: Apache-2.0
"""PEFT methods: adapters whose layers share a learngene. What they have in common is in `base_*.py`."""

from .base_model import SharedGroup, shared_groups
from .fine import FINEConfig, FINEModel, save_as_lora, to_lora
from .kind import KINDConfig, KINDModel, class_gate
from .scalers import freeze_bank_, get_scalers, set_scalers_
from .wave import WAVEConfig, WAVEModel


__all__ = [
    "FINEConfig",
    "FINEModel",
    "KINDConfig",
    "KINDModel",
    "SharedGroup",
    "WAVEConfig",
    "WAVEModel",
    "class_gate",
    "freeze_bank_",
    "get_scalers",
    "save_as_lora",
    "set_scalers_",
    "shared_groups",
    "to_lora",
]
