# SPDX-License-Identifier: Apache-2.0
"""What belongs to a model beside its weights and its config, and without which its folder is not whole.

small   generation config, names of a DiT's labels, preprocessing, the layout of a SentenceTransformer: JSON
        (`companions`)
large   tokenizer, the other parts of a pipeline: they are named, and taken from where they lie (`Source`)
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import transformers
from huggingface_hub.errors import HFValidationError
from torch import nn

from ..hub.files import hub_id, local_folder
from .companions import SENTENCE_MODULE, Companions, carried, is_pipeline
from .models import num_labels


__all__ = [
    "TOKENIZER_FILES",
    "Belongings",
    "Source",
    "belongings_of",
    "read_json",
    "source_of",
    "tokenizer_files",
]

_logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "bpe.codes", "dict.txt"),
    *("entity_vocab.json", "emoji.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
PREPROCESSOR, PROCESSOR, PIPELINE = "preprocessor_config.json", "processor_config.json", "model_index.json"
MODULES, SENTENCES, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_SMALL_FILES = (PREPROCESSOR, PROCESSOR, PIPELINE, MODULES, SENTENCES, PROMPTS, "*_*/config.json")
_SNAPSHOT = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})(/.*)?")


@dataclass(frozen=True)
class Source:
    """Where what belongs to a model lies: a folder, or a repository on the Hub."""

    name: str
    revision: str | None = None
    kept: TemporaryDirectory | None = field(default=None, compare=False, repr=False)  # goes with the last who knows it

    def folder(self, patterns: Sequence[str]) -> Path | None:
        """A folder with its files of these patterns; None where it cannot be reached, which is logged."""
        try:
            return local_folder(self.name, patterns, revision=self.revision)
        except (OSError, HFValidationError) as error:
            _logger.warning("%r cannot be reached for what belongs to the model: %s", self.name, error)
            return None


@dataclass(frozen=True)
class Belongings:
    """The small companions of a model, and where the large ones lie, if that is known.

    Attributes:
        tokenizer: a folder that holds the tokenizer's files, if they do not lie at the source.
    """

    small: Companions = Companions()
    source: Source | None = None
    tokenizer: Path | None = None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder, relative to it."""
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def source_of(model: nn.Module, revision: str | None = None) -> Source | None:
    """Where a model was loaded from, as far as it says: of a repository, not which revision."""
    config: Any = model.config
    name = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return _resolved(str(name), revision) if name else None


def _resolved(name: str, revision: str | None) -> Source | None:
    """A folder or a repository of that name; a folder in the Hub's cache is the repository that it is a copy of."""
    folder = Path(name).absolute()
    if snapshot := _SNAPSHOT.fullmatch(folder.as_posix()):
        return Source(f"{snapshot[1]}/{snapshot[2]}", snapshot[3])
    if folder.is_dir():
        in_pipeline = (folder.parent / PIPELINE).is_file() and not (folder / PIPELINE).is_file()
        return Source(str(folder.parent if in_pipeline else folder))
    return Source(name, revision) if hub_id(name) or re.fullmatch(r"[\w.-]{1,96}", name) else None


def belongings_of(model: nn.Module, companions: Any = None, *, revision: str | None = None) -> Belongings:
    """What belongs to a model, read from the model and from where the rest lies.

    Args:
        companions: a folder or Hub id, or objects that can be saved to one: an image processor, a tokenizer, a
            processor, a generation config, a pipeline, or several of them. Default: where the model was loaded from.
        revision: of a Hub id.

    Raises:
        ValueError: something else.
    """
    if isinstance(companions, Belongings):
        return companions
    if companions is None:
        source = source_of(model, revision)
    elif isinstance(companions, str | Path):
        source = _resolved(str(companions), revision)
    else:
        source = _saved(model, companions if isinstance(companions, list | tuple) else [companions])
    if companions is not None and source is None:
        raise ValueError(f"companions={companions!r} is neither a folder nor a Hub id.")
    folder = None if source is None else source.folder([*_SMALL_FILES, *TOKENIZER_FILES])
    if source is None or folder is None:
        return Belongings(Companions(generation_config=_generation(model, None)), source)
    index = read_json(folder / PIPELINE)
    part = _pipeline(model, index)
    small = Companions(
        generation_config=_generation(model, folder if source.kept else None),
        id2label=_labels(model, index),
        preprocessor=None if part else _preprocessor(folder),
        sentences=None if part else _sentences(folder),
        pipeline=part,
        tokenizer=not part and bool(tokenizer_files(folder)),
        revision=source.revision or _revision(folder),
    )
    return Belongings(small, source)


def _revision(folder: Path) -> str | None:
    """Of a folder in the Hub's cache, the commit that it is a copy of."""
    snapshot = _SNAPSHOT.fullmatch(folder.absolute().as_posix())
    return snapshot and snapshot[3]


def _saved(model: nn.Module, objects: Sequence[Any]) -> Source:
    """A folder with these objects in it, which is there as long as anybody knows it."""
    kept = TemporaryDirectory(prefix="companions-")
    for each in objects:
        if isinstance(each, diffusers.DiffusionPipeline):
            each.save_config(kept.name)
            _write_labels(each, Path(kept.name, PIPELINE))
            for name, component in each.components.items():
                if component is not None and component is not model and hasattr(component, "save_pretrained"):
                    component.save_pretrained(Path(kept.name, name))
        elif isinstance(each, nn.Module) or not hasattr(each, "save_pretrained"):
            raise ValueError(
                f"companions: a {type(each).__name__} belongs to no model. A folder or Hub id does, or processors, "
                "tokenizers, generation configs, pipelines."
            )
        else:
            each.save_pretrained(kept.name)
    return Source(kept.name, None, kept)


def _write_labels(pipeline: Any, path: Path) -> None:
    """Put the names of labels that a pipeline knows into its index: its own `save_pretrained` leaves them out."""
    named: dict[str, list[str]] = {}
    for name, label in (getattr(pipeline, "labels", None) or {}).items():
        named.setdefault(str(label), []).append(name)
    if named:
        id2label = {label: ", ".join(names) for label, names in named.items()}
        path.write_text(json.dumps({**read_json(path), "id2label": id2label}), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _generation(model: Any, given: Path | None) -> dict[str, Any] | None:
    """The generation config in the folder of what was given, else the model's own, if it generates."""
    config = getattr(model, "generation_config", None)
    if not isinstance(config, transformers.GenerationConfig) or not model.can_generate():
        return None
    own = json.loads(config.to_json_string(use_diff=True))
    if given is not None:
        own = read_json(given / "generation_config.json") or own
    return carried("generation_config", own)


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    nested = read_json(folder / PROCESSOR)
    own = nested.get("image_processor") or nested.get("feature_extractor") or read_json(folder / PREPROCESSOR)
    return carried("preprocessor", own)


def _labels(model: Any, index: dict[str, Any]) -> dict[str, str] | None:
    count = num_labels(type(model).__name__, dict(model.config)) if isinstance(model.config, Mapping) else None
    named = {str(key): str(name) for key, name in (index.get("id2label") or {}).items()}
    return named if count is not None and named else None


def _pipeline(model: nn.Module, index: dict[str, Any]) -> dict[str, str] | None:
    """The pipeline that an index is of, and which of its components the model is."""
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    names = {type(model).__name__, "Transformer2DModel"}  # as older files call a DiT and a PixArt
    component = next((name for name, kind in classes.items() if kind in names), None)
    kind = index.get("_class_name")
    return {"class": str(kind), "component": component} if component and is_pipeline(kind) else None


def _sentences(folder: Path) -> dict[str, Any] | None:
    """The layout of a SentenceTransformer, if it has one of modules without weights of their own."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        found = [(str(entry["type"]), read_json(folder / entry["path"] / "config.json")) for entry in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    entries = []
    for kind, config in found:
        if not SENTENCE_MODULE.fullmatch(kind):
            _logger.warning("modules.json is not carried: %r has weights or code of its own.", kind)
            return None
        own = {} if kind.endswith(".Transformer") else carried(kind, config) or {}  # the first one's is the model's
        entries.append({"type": kind, "config": own})
    files = {"config": read_json(folder / SENTENCES), "prompts": read_json(folder / PROMPTS)}
    return {"modules": entries, **{name: carried(name, value) or {} for name, value in files.items()}}
