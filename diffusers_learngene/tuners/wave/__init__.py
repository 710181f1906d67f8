# SPDX-License-Identifier: Apache-2.0
"""WAVE as a PEFT method: templates that layers share, and each layer's weight scalers."""

from .config import WAVEConfig
from .layer import TemplateBank, WAVELayer
from .model import WAVEModel


__all__ = ["TemplateBank", "WAVEConfig", "WAVELayer", "WAVEModel"]
