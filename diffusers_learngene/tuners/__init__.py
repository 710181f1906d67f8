# SPDX-License-Identifier: Apache-2.0
"""PEFT methods: adapters whose layers share a learngene.

Here lives PEFT's side of each method, as PEFT's own tuners are laid out (`wave/`, `fine/`, `kind/`: config, layer,
model), and in `base_*.py` what they have in common. Not here: the artefact (`learngene/`), nor entries in PEFT's
tables (`integrations.py`).
"""

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
