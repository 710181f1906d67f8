# SPDX-License-Identifier: Apache-2.0
"""Learngenes for diffusers: one small artefact, from which models of any depth and width are built.

Importing the package registers its methods with PEFT.
"""

from .integrations import register_peft_methods
from .tuners import WAVEConfig, WAVEModel


__version__ = "0.1.0"

__all__ = ["WAVEConfig", "WAVEModel", "__version__"]

register_peft_methods()
