# SPDX-License-Identifier: Apache-2.0
from .config import WAVEConfig
from .layer import TemplateBank, WAVELayer
from .model import WAVEModel


__all__ = ["TemplateBank", "WAVEConfig", "WAVELayer", "WAVEModel"]
