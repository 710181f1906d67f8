# SPDX-License-Identifier: Apache-2.0
"""A plain model and everything that belongs to it, as one folder that loads as its ancestry's did.

    transformers   config with the labels, weights, generation_config.json, preprocessor_config.json, the tokenizer
                   with its chat template, the layout of a SentenceTransformer
    diffusers      a folder of the model; or, where it is part of a pipeline that is at hand, the whole pipeline

What is large, tokenizers and the other parts of a pipeline, is copied from where the ancestry's lies; that it is not
at hand is logged. No code is copied, and no file keeps the name of any.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..anatomy.belongings import (
    MODULES,
    PIPELINE,
    PREPROCESSOR,
    PROMPTS,
    SENTENCES,
    TOKENIZER_FILES,
    Belongings,
    read_json,
    tokenizer_files,
)
from ..anatomy.companions import Companions
from ..anatomy.models import num_labels
from ..hub.files import write


__all__ = ["copy_tokenizer", "save_model", "tokenizer_at_hand"]

_logger = logging.getLogger(__name__)

_DATA = ("*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja")  # of a pipeline's components


def save_model(model: nn.Module, folder: str | Path, belongings: Belongings) -> None:
    """Write a plain model with what belongs to it; a folder of another model that is there is not emptied first."""
    folder, small = Path(folder), belongings.small
    folder.mkdir(parents=True, exist_ok=True)
    root = _pipeline_at_hand(belongings)
    if small.pipeline and root is not None:
        _save_pipeline(model, folder, small, root)
        return
    model.save_pretrained(folder)  # type: ignore[operator]
    if small.generation_config and (folder / "generation_config.json").is_file():
        _write_json(folder / "generation_config.json", small.generation_config)
    if small.preprocessor:
        _write_json(folder / PREPROCESSOR, small.preprocessor)
    if small.sentences:
        _save_sentences(model, folder, small.sentences)
    if small.tokenizer and not copy_tokenizer(belongings, folder):
        _logger.warning(
            "the tokenizer of the ancestry is not at hand, so that %s has none: give companions=, or "
            "include_tokenizer=True, when condensing.",
            folder,
        )


def copy_tokenizer(belongings: Belongings, folder: Path) -> bool:
    """Copy a tokenizer's files into a folder; whether there were any."""
    try:
        origin = tokenizer_at_hand(belongings)
    except ValueError:
        return False
    _copy(origin, tokenizer_files(origin), folder)
    return True


def tokenizer_at_hand(belongings: Belongings) -> Path:
    """The folder that a tokenizer's files are in.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    folder, source = belongings.tokenizer, belongings.source
    if folder is None and source is not None:
        folder = source.folder(TOKENIZER_FILES)
    if folder is None or not tokenizer_files(folder):
        raise ValueError("include_tokenizer=True, but no tokenizer is at hand: give it, or its folder, as companions.")
    return folder


def _copy(origin: Path, names: Iterable[Path], folder: Path) -> None:
    """Copy files, without the names of code in them."""
    for name in names:
        source, target = origin / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".json" and "auto_map" in (values := read_json(source)):
            _write_json(target, {key: value for key, value in values.items() if key != "auto_map"})
        elif source.resolve() != target.resolve():
            write(target, partial(shutil.copyfile, source))


def _write_json(path: Path, values: Any) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _save_sentences(model: Any, folder: Path, sentences: dict[str, Any]) -> None:
    modules = []
    for index, entry in enumerate(sentences["modules"]):
        name = entry["type"].rpartition(".")[2]
        path = "" if name == "Transformer" else f"{index}_{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": entry["type"]})
        if path:
            (folder / path).mkdir(exist_ok=True)
            width = {key: model.config.hidden_size for key in entry["config"] if key.endswith("embedding_dimension")}
            _write_json(folder / path / "config.json", {**entry["config"], **width})
    _write_json(folder / MODULES, modules)
    for name, values in ((SENTENCES, sentences["config"]), (PROMPTS, sentences["prompts"])):
        if values:
            _write_json(folder / name, values)


def _pipeline_at_hand(belongings: Belongings) -> Path | None:
    """The folder of the pipeline that the model is part of, with all other components; None if there is none."""
    small, source = belongings.small, belongings.source
    if not small.pipeline:
        return None
    index = source and source.folder([PIPELINE])
    others = _other_components(index, small.pipeline["component"]) if index else []
    root = source.folder([PIPELINE, *(f"{name}/{kind}" for name in others for kind in _DATA)]) if source else None
    lacking = [name for name in others if root and not (root / name).is_dir()]
    if not others or root is None or lacking:
        _logger.warning(
            "the other parts of the ancestry's %s are not at hand%s: the model is written alone.",
            small.pipeline["class"],
            f" ({lacking})" if lacking else "",
        )
        return None
    return root


def _other_components(root: Path, component: str) -> list[str]:
    """Names of the other parts of a pipeline; its index may be a stranger's, and they become parts of paths.

    Raises:
        ValueError: one is no name.
    """
    parts = {name: entry for name, entry in read_json(root / PIPELINE).items() if isinstance(entry, list)}
    if odd := [name for name in parts if not name.isidentifier()]:
        raise ValueError(f"{PIPELINE} of the ancestry names the component {odd[0]!r}, which is no name of a folder.")
    return [name for name, entry in parts.items() if entry and entry[-1] and name != component]


def _save_pipeline(model: Any, folder: Path, small: Companions, root: Path) -> None:
    assert small.pipeline is not None
    component = small.pipeline["component"]
    model.save_pretrained(folder / component)
    for name in _other_components(root, component):
        files = sorted(path for kind in _DATA for path in (root / name).glob(kind))
        _copy(root, [path.relative_to(root) for path in files], folder)
    index = {
        key: value for key, value in read_json(root / PIPELINE).items() if key not in ("id2label", "_name_or_path")
    }
    index[component] = ["diffusers", type(model).__name__]
    count = num_labels(type(model).__name__, dict(model.config)) or 0
    if named := {key: name for key, name in (small.id2label or {}).items() if int(key) < count}:
        index["id2label"] = named
    _write_json(folder / PIPELINE, index)
