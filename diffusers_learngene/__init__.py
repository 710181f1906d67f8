# SPDX-License-Identifier: Apache-2.0
"""Learngenes for diffusers: one small artefact, from which models of any depth and width are built.

Importing the package registers its methods with PEFT, and `custom_pipeline="cretok"` with diffusers; it costs PEFT's
import and little more, because what needs diffusers' models or pipelines is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations import register_custom_pipelines, register_peft_methods
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
from .version import __version__


if TYPE_CHECKING:
    from .evolution.grl.artefact import Gene, GeneError
    from .evolution.gtl.artefact import Circuit, CircuitError
    from .learngene import Learngene, LearngeneError
    from .pipelines.cretok import CreTokPipeline
    from .pipelines.token import CreTok, CreTokError

__all__ = [
    "Circuit",
    "CircuitError",
    "CreTok",
    "CreTokError",
    "CreTokPipeline",
    "FINEConfig",
    "FINEModel",
    "Gene",
    "GeneError",
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
register_custom_pipelines()

_LAZY = {
    "Circuit": ".evolution.gtl.artefact",
    "CircuitError": ".evolution.gtl.artefact",
    "Gene": ".evolution.grl.artefact",
    "GeneError": ".evolution.grl.artefact",
    "CreTok": ".pipelines.token",
    "CreTokError": ".pipelines.token",
    "CreTokPipeline": ".pipelines.cretok",
    "Learngene": ".learngene",
    "LearngeneError": ".learngene",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
