# SPDX-License-Identifier: Apache-2.0
from .config import KINDConfig
from .gate import class_gate
from .layer import KINDLayer, TailoredBank
from .model import KINDModel


__all__ = ["KINDConfig", "KINDLayer", "KINDModel", "TailoredBank", "class_gate"]
