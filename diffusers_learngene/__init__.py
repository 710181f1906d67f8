# SPDX-License-Identifier: Apache-2.0
"""Learngenes for diffusers: one small artefact, from which models of any depth and width are built.

Importing the package registers its methods with PEFT; it costs PEFT's import and little more, because `Learngene`,
which needs diffusers, is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from .integrations import register_peft_methods
from .tuners import (
    FINEConfig,
    FINEModel,
    KINDConfig,
    KINDModel,
    WAVEConfig,
    WAVEModel,
    class_gate,
    freeze_bank_,
    get_scalers,
    save_as_lora,
    set_scalers_,
    to_lora,
)


if TYPE_CHECKING:
    from .learngene import Learngene, LearngeneError

__version__ = "0.1.0"

__all__ = [
    "FINEConfig",
    "FINEModel",
    "KINDConfig",
    "KINDModel",
    "Learngene",
    "LearngeneError",
    "WAVEConfig",
    "WAVEModel",
    "__version__",
    "class_gate",
    "freeze_bank_",
    "get_scalers",
    "save_as_lora",
    "set_scalers_",
    "to_lora",
]

register_peft_methods()


def __getattr__(name: str) -> Any:
    if name in ("Learngene", "LearngeneError"):
        from . import learngene

        return getattr(learngene, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
