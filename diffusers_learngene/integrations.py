# SPDX-License-Identifier: Apache-2.0
"""The only file that writes into other libraries' tables.

PEFT looks everything about a method up in a few dicts; `tuners.peft_types` says why ours can be keys of them.

diffusers knows no plugins: a bare `custom_pipeline` name is looked up in a repository of its own, over the network.
So three public class methods of `DiffusionPipeline` are wrapped, and look whether the name is ours first. Importing
that class takes seconds, which whoever came for something else should not pay; until it has been imported, only its
parent (in a light module) is told to wrap it when it is made.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .tuners.base_config import LearngeneConfig
from .tuners.fine import FINEConfig, FINEModel
from .tuners.kind import KINDConfig, KINDModel
from .tuners.peft_types import LearngenePeftType
from .tuners.wave import WAVEConfig, WAVEModel


def register_peft_methods() -> None:
    """Make PEFT, diffusers and transformers know our methods. Calling it again changes nothing.

    Raises:
        KeyError: another package has registered one of our names.
    """
    entries = [
        (table, peft_type, entry)
        for peft_type, config, model in (
            (LearngenePeftType.LEARNGENE_WAVE, WAVEConfig, WAVEModel),
            (LearngenePeftType.LEARNGENE_FINE, FINEConfig, FINEModel),
            (LearngenePeftType.LEARNGENE_KIND, KINDConfig, KINDModel),
        )
        for table, entry in (
            (PEFT_TYPE_TO_CONFIG_MAPPING, config),
            (PEFT_TYPE_TO_TUNER_MAPPING, model),
            (PEFT_TYPE_TO_PREFIX_MAPPING, peft_type.prefix),
        )
    ]
    for table, peft_type, entry in entries:
        if table.get(peft_type, entry) != entry:
            raise KeyError(f"The PEFT method {peft_type.value} is already registered as {table[peft_type]!r}.")
    for table, peft_type, entry in entries:
        table[peft_type] = entry


def learngene_config_class(peft_type: str) -> type[LearngeneConfig] | None:
    """The config class of one of our methods, None for every other name."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] if peft_type in LearngenePeftType.__members__ else None


CUSTOM_PIPELINES = ("cretok",)
_PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"


def register_custom_pipelines() -> None:
    """Make `custom_pipeline="cretok"` known to `DiffusionPipeline.from_pretrained`, `.from_pipe` and `.download`, and
    so to AutoPipeline, whether they are imported before or after. Calling it again changes nothing."""
    made = getattr(sys.modules.get(_PIPELINE_MODULE), "DiffusionPipeline", None)
    if made is not None:
        _wrap_pipeline_class(made)
        return
    from diffusers.configuration_utils import ConfigMixin

    def wrap_when_made(cls: type, **kwargs: Any) -> None:
        super(ConfigMixin, cls).__init_subclass__(**kwargs)
        if (cls.__module__, cls.__name__) == (_PIPELINE_MODULE, "DiffusionPipeline"):
            del ConfigMixin.__init_subclass__
            _wrap_pipeline_class(cls)

    ConfigMixin.__init_subclass__ = classmethod(wrap_when_made)


def _wrap_pipeline_class(pipeline_class: Any) -> None:
    for name in ("from_pretrained", "from_pipe", "download"):
        original = pipeline_class.__dict__[name].__func__
        if not hasattr(original, "without_learngene"):
            setattr(pipeline_class, name, classmethod(_choosing(original)))


def _choosing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The class method of that name, which hands names of ours to `CreTokPipeline` and all else to the original."""

    @functools.wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_pipeline") not in CUSTOM_PIPELINES:
            return original(cls, *args, **kwargs)
        from .pipelines.cretok import CreTokPipeline

        own = {key: value for key, value in kwargs.items() if key not in ("custom_pipeline", "custom_revision")}
        return getattr(CreTokPipeline, original.__name__)(*args, **own)

    method.without_learngene = original  # type: ignore[attr-defined]
    return method
