# SPDX-License-Identifier: Apache-2.0
"""KIND as a PEFT method: learngenes for all classes, tailors for some, and the gate that opens them."""

from .config import KINDConfig
from .gate import class_gate
from .layer import KINDLayer, TailoredBank
from .model import KINDModel


__all__ = ["KINDConfig", "KINDLayer", "KINDModel", "TailoredBank", "class_gate"]
