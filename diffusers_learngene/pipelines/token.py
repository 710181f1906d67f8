# SPDX-License-Identifier: Apache-2.0
"""The artefact of CreTok: one embedding row per CLIP text encoder, a description, and a card with example images.

    learned_embeds.safetensors      {token: (1, width)} for text_encoder
    learned_embeds_2.safetensors    the same for text_encoder_2, if the base has a second CLIP encoder
    config.json, README.md

This is the layout of diffusers' textual inversion, so stock pipelines read it with `load_textual_inversion`, one call
an encoder. The description is in the metadata of every file, which have to agree; config.json repeats it for readers
and for the Hub's download counter. Data only: nothing is ever unpickled, and nothing in a file names code, or a path.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hub.descriptions import (
    check_settings,
    check_version,
    described_file,
    exact_fields,
    finite_tensors,
    read_tensors,
)
from ..hub.files import HUB_ID
from ..hub.shared import SharedArtefact
from .prompts import PLAIN_WORD, TEMPLATE, TOKEN, adaptive_prompt


__all__ = ["CreTok", "CreTokConfig", "CreTokError", "check_token"]

FORMAT_VERSION = 1
WEIGHTS = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
    "text_encoder_3": "learned_embeds_3.safetensors",
}
_MAX_WIDTH = 2**16


class CreTokError(ValueError):
    """A CreTok file or folder that is incomplete, damaged, or none at all; the message names what is wrong."""


@dataclass(frozen=True)
class CreTokConfig:
    """What a CreTok artefact says about itself.

    Attributes:
        encoders: width of the row of every text encoder, by the name of the pipeline component.
        token: as it is written in prompts.
        plain_word: what a text encoder reads in its place that has no row of it (T5).
        template: of the prompt that it was trained in, {} where the token stands.
        base_class: class name of the pipeline whose encoders it was trained for.
        base_model: Hub id of that pipeline, if it has one.
        training: the settings of the training: numbers, words, and lists of them.
        format_version: of this layout.

    Raises:
        ValueError: a value that cannot be.
    """

    encoders: dict[str, int]
    token: str = TOKEN
    plain_word: str = PLAIN_WORD
    template: str = TEMPLATE
    base_class: str | None = None
    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_version(self.format_version, FORMAT_VERSION)
        if not isinstance(self.encoders, dict) or not self.encoders or not self.encoders.keys() <= WEIGHTS.keys():
            raise ValueError(f"encoders={self.encoders!r} must name some of {list(WEIGHTS)}.")
        for name, width in self.encoders.items():
            if type(width) is not int or not 1 <= width <= _MAX_WIDTH:
                raise ValueError(f"encoders: the width {width!r} of {name} must be a number from 1 to {_MAX_WIDTH}.")
        check_token(self.token)
        for name in ("plain_word", "template"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip() or len(value) > 1000:
                raise ValueError(f"{name}={value!r} must be words.")
        adaptive_prompt(self.token, self.template)
        if self.base_class is not None and not (isinstance(self.base_class, str) and self.base_class.isidentifier()):
            raise ValueError(f"base_class={self.base_class!r} must be the name of a class or null.")
        if self.base_model is not None and not (
            isinstance(self.base_model, str) and HUB_ID.fullmatch(self.base_model)
        ):
            raise ValueError(f"base_model={self.base_model!r} must be a Hub id or null.")
        check_settings("training", self.training)

    def renamed(self, token: str) -> "CreTokConfig":
        """The same under another name."""
        return replace(self, token=token)


def check_token(token: object) -> None:
    """Raise a ValueError unless it can be written in a prompt as one word."""
    if not isinstance(token, str) or not re.fullmatch(r"\S{1,64}", token):
        raise ValueError(f"token={token!r} must be one word of up to 64 characters, such as {TOKEN!r}.")


class CreTok(SharedArtefact):
    """A trained token: `config`, and `rows`, (width,) in fp32 on the CPU by text encoder.

    Pipelines have verbs for it (`load_cretok`, `save_cretok`, `push_cretok`, `unload_cretok`).

    Raises:
        CreTokError: rows that are not those of the config, or not finite.
    """

    weights, key = tuple(WEIGHTS.values()), "cretok"
    error = CreTokError
    template = "cretok"

    def __init__(self, config: CreTokConfig, rows: dict[str, Tensor]) -> None:
        self.config = config
        widths = {name: (width,) for name, width in config.encoders.items()}
        self.rows = finite_tensors({name: row.flatten() for name, row in rows.items()}, widths, CreTokError)
        self.card = {}

    def data_files(self) -> dict[str, Mapping[str, Tensor]]:
        return {WEIGHTS[name]: {self.config.token: row[None]} for name, row in self.rows.items()}

    @classmethod
    def read_data(cls, paths: dict[str, Path]) -> "CreTok":
        return cls(*_read({name: paths[file] for name, file in WEIGHTS.items() if file in paths}))

    def card_metadata(self) -> dict[str, Any]:
        tags = ["cretok", "textual-inversion", "diffusers-learngene", "safetensors"]
        base_model = self.config.base_model
        return {"library_name": "diffusers", "base_model": base_model, "pipeline_tag": "text-to-image", "tags": tags}

    def card_variables(self) -> dict[str, Any]:
        return asdict(self.config) | {"weights": {name: WEIGHTS[name] for name in self.config.encoders}}


def _read(paths: dict[str, Path]) -> tuple[CreTokConfig, dict[str, Tensor]]:
    """Config and rows of the files of an artefact, whose headers are checked before a tensor is read."""
    rows, configs = {}, []
    for name, path in paths.items():
        with described_file(path, CreTok.key, "a CreTok", CreTokError) as (values, file):
            config = CreTokConfig(**exact_fields(CreTokConfig, values))
            configs.append(config)
            (rows[name],) = read_tensors(file, {config.token: (1, config.encoders.get(name))}).values()
    if any(config != configs[0] for config in configs) or rows.keys() != configs[0].encoders.keys():
        raise CreTokError(
            f"the files {[str(path) for path in paths.values()]} are not of one CreTok, whose encoders are "
            f"{list(configs[0].encoders)}: download or copy the whole folder again."
        )
    return configs[0], rows
