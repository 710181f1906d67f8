# SPDX-License-Identifier: Apache-2.0
"""PEFT methods: adapters whose layers share a learngene. What they have in common is in `base_*.py`."""

from .base_model import SharedGroup, shared_groups
from .wave import WAVEConfig, WAVEModel


__all__ = ["SharedGroup", "WAVEConfig", "WAVEModel", "shared_groups"]
