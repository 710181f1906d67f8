# SPDX-License-Identifier: Apache-2.0
"""What is small of all that belongs to a model beside its weights and its config: JSON, for a learngene's file.

It may come from a stranger's file: nothing passes that names code, a path or an address, or has no bounds.
"""

import json
import logging
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import diffusers

from ..hub.descriptions import exact_fields
from .models import num_labels


__all__ = ["SENTENCE_MODULE", "Companions", "carried", "is_pipeline"]

_logger = logging.getLogger(__name__)

SENTENCE_MODULE = re.compile(r"sentence_transformers(\.\w+)*\.(Transformer|Pooling|Normalize)")

_CODE = {"auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "transformers_version"}
_MAX_TEXT, _MAX_NAME, _MAX_DEPTH = 2**20, 1000, 8  # of a companion as JSON, of a label, of a value in a value
_PLACE = re.compile(r".*(://|\\).*|(/|~|\.\.?/).*|[\w.-]+(/[\w.-]+)+", re.DOTALL)  # a path, an address, a repository
_REVISION = re.compile(r"\w[\w./-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Companions:
    """JSON that belongs to a model.

    Attributes:
        generation_config: of a model that generates: stop tokens, sampling.
        id2label: names of a DiT's labels, by id as text; one need not have a name. (A classifier's are in its config.)
        preprocessor: the content of preprocessor_config.json.
        sentences: of a SentenceTransformer: {"modules": [{"type": its class, "config": {...}}, ...], "config":
            sentence_bert_config.json, "prompts": config_sentence_transformers.json}.
        pipeline: {"class": of the pipeline, "component": what the model is called in it}.
        tokenizer: whether there is one, which is the ancestry's.
        revision: of the ancestry on the Hub.
    """

    generation_config: dict[str, Any] | None = None
    id2label: dict[str, str] | None = None
    preprocessor: dict[str, Any] | None = None
    sentences: dict[str, Any] | None = None
    pipeline: dict[str, str] | None = None
    tokenizer: bool = False
    revision: str | None = None

    @classmethod
    def read(cls, values: Any, architecture: str, base_config: dict[str, Any]) -> "Companions":
        """Those of a description of a model.

        Raises:
            ValueError: naming what is wrong with them.
        """
        found = cls(**exact_fields(cls, values))
        for name in ("generation_config", "preprocessor", "sentences", "pipeline"):
            _check_json(name, getattr(found, name))
        _check_labels(found.id2label, num_labels(architecture, base_config))
        _check_modules(found.sentences)
        if type(found.tokenizer) is not bool:
            raise ValueError(f"tokenizer={found.tokenizer!r} must be true or false.")
        if found.revision is not None and not (
            isinstance(found.revision, str) and _REVISION.fullmatch(found.revision)
        ):
            raise ValueError(f"revision={found.revision!r} must be a revision on the Hub or null.")
        if found.pipeline is not None:
            kind = found.pipeline.get("class") if found.pipeline.keys() == {"class", "component"} else None
            component = found.pipeline.get("component")
            if not is_pipeline(kind) or not isinstance(component, str) or not component.isidentifier():
                raise ValueError(f"pipeline={found.pipeline!r} must name a pipeline of diffusers and a component.")
        return found


def is_pipeline(name: Any) -> bool:
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def _check_json(name: str, value: Any) -> None:
    """Raise a ValueError unless this is null or a JSON object of bounded size that names no code and no place."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{name}={str(value)[:60]!r} must be an object or null.")
    if len(json.dumps(value)) > _MAX_TEXT:
        raise ValueError(f"{name} is longer than {_MAX_TEXT} characters.")
    if (wrong := _forbidden(value)) is not None:
        raise ValueError(f"{name}: {wrong} is not allowed in it: a learngene is data only.")


def _forbidden(value: Any, depth: int = 0) -> str | None:
    """What in a value names code or a place, or is too deep; None: nothing."""
    if depth > _MAX_DEPTH:
        return f"more than {_MAX_DEPTH} values in one another"
    if isinstance(value, str):
        return repr(value[:60]) if _PLACE.fullmatch(value) else None
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str) or key in _CODE or key.startswith("_"):
                return repr(key)
            if (wrong := _forbidden(entry, depth + 1)) is not None:
                return f"{key}={wrong}"
    elif isinstance(value, list):
        return next((wrong for entry in value if (wrong := _forbidden(entry, depth + 1)) is not None), None)
    return None


def _check_labels(id2label: Any, count: int | None) -> None:
    if id2label is None:
        return
    if count is None or not isinstance(id2label, dict):
        raise ValueError(f"id2label={str(id2label)[:60]} must be null, or an object of a model that has labels.")
    for key, name in id2label.items():
        if not isinstance(key, str) or not re.fullmatch("0|[1-9][0-9]{0,8}", key) or int(key) >= count:
            raise ValueError(f"id2label: {key!r} is no label of the model, which has {count}.")
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise ValueError(f"id2label: {str(name)[:60]!r} is no name of a label.")


def _check_modules(sentences: dict[str, Any] | None) -> None:
    if sentences is None:
        return
    modules = sentences.get("modules") if sentences.keys() == {"modules", "config", "prompts"} else None
    if _all_dicts(modules) and all(entry.keys() == {"type", "config"} for entry in modules):
        configs = [*(entry["config"] for entry in modules), sentences["config"], sentences["prompts"]]
        kinds = [entry["type"] for entry in modules]
        if _all_dicts(configs) and all(isinstance(kind, str) and SENTENCE_MODULE.fullmatch(kind) for kind in kinds):
            return
    raise ValueError(
        "sentences must have a config, prompts, and modules with types of sentence_transformers and configs."
    )


def _all_dicts(values: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def carried(name: str, value: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a JSON object a learngene's file may carry; the keys that it may not are logged, code aside."""
    if not value:
        return None
    kept = {key: _without_code(entry) for key, entry in value.items() if key not in _CODE and not key.startswith("_")}
    dropped = [key for key, entry in kept.items() if _forbidden({key: entry}) is not None]
    if dropped:
        _logger.warning("of %s, %s are not carried: they name places.", name, dropped)
    return {key: entry for key, entry in kept.items() if key not in dropped} or None


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(entry) for key, entry in value.items() if key not in _CODE}
    return [_without_code(entry) for entry in value] if isinstance(value, list) else value
