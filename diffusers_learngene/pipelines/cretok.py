# SPDX-License-Identifier: Apache-2.0
"""The CreTok pipelines: stock text-to-image pipelines of diffusers, with verbs for tokens that blend concepts.

    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="cretok")    # after `import diffusers_learngene`
    pipe = CreTokPipeline.from_pretrained(base)                                 # the same, spelled out
    pipe.load_cretok("me/cretok-sd3")
    image = pipe(pipe.blend_prompt(["lettuce", "mantis"])).images[0]

The class is chosen by the base's own: `FAMILIES`. It *is* the base's, so whatever diffusers has for that (LoRA, IP
adapters, schedulers, offloading, callbacks, `from_pipe` to its siblings) goes on working. Rows live in the embedding
tables and nowhere else; what the pipeline knows about its tokens is in its config, under "_cretok", which stock
diffusers saves and ignores.

What T5 sees. CreTok is a row of CLIP's tables; T5 has none, and its tokenizer reads the artefact's plain word
("creative") in its place: in `prompt_2` (Flux) and `prompt_3` (SD3), too, and in every pipeline that shares it. To
drop T5 from SD3 altogether, load the pipeline with `text_encoder_3=None, tokenizer_3=None`, as diffusers has it; Flux
cannot do without.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import logging

from .encoders import ClipEncoder, clip_encoders, get_row, put_row_, read_as_, t5_tokenizers
from .prompts import blend_prompt
from .token import CreTok, CreTokConfig, check_token


__all__ = [
    "FAMILIES",
    "CreTokFluxPipeline",
    "CreTokPipeline",
    "CreTokStableDiffusion3Pipeline",
    "CreTokStableDiffusionPipeline",
    "CreTokStableDiffusionXLPipeline",
    "family_of",
]

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
_CONFIG_KEY = "_cretok"


class CreTokPipeline(DiffusionPipeline, TextualInversionLoaderMixin):
    """What all CreTok pipelines share; its own `from_pretrained`, `from_pipe` and `download` choose one of them."""

    base_class: ClassVar[type[DiffusionPipeline]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # diffusers goes by the name of a class: in the folders that it saves, which anyone's diffusers shall load, and
        # where AutoPipeline looks for its siblings.
        cls.__name__ = cls.base_class.__name__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "CreTokPipeline":
        """As `DiffusionPipeline.from_pretrained`, of a base or of a folder that a CreTok pipeline saved.

        Raises:
            ValueError: a base of another class than `FAMILIES` has.
        """
        config = cls.load_config(pretrained_model_name_or_path, **_hub_arguments(kwargs))
        family = family_of(config["_class_name"]) if cls is CreTokPipeline else cls
        pipe = super(CreTokPipeline, family).from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe._describe({token: CreTokConfig(**entry) for token, entry in config.get(_CONFIG_KEY, {}).items()})
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "CreTokPipeline":
        """As `DiffusionPipeline.from_pipe`: a pipeline over the same components, which are shared, not copied."""
        family = family_of(type(pipeline).__name__) if cls is CreTokPipeline else cls
        return super(CreTokPipeline, family).from_pipe(pipeline, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """As `DiffusionPipeline.download`: the files of a base, from the Hub into the cache."""
        config = cls.load_config(pretrained_model_name, **_hub_arguments(kwargs))
        family = family_of(config["_class_name"]) if cls is CreTokPipeline else cls
        return super(CreTokPipeline, family).download(pretrained_model_name, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        if _CONFIG_KEY in config:  # what is written goes by what is there
            config[_CONFIG_KEY] = {token: config[_CONFIG_KEY][token] for token in self.cretok_tokens}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def cretok_tokens(self) -> dict[str, CreTokConfig]:
        """The tokens that are loaded, in the order in which they came: in the tokenizers of all CLIP text encoders.

        (Pipelines that share the encoders may have taken some out.)
        """
        vocabularies = [encoder.tokenizer.get_vocab() for encoder in clip_encoders(self.components).values()]
        return {
            token: config
            for token, config in self._described.items()
            if all(token in vocabulary for vocabulary in vocabularies)
        }

    @property
    def _described(self) -> dict[str, CreTokConfig]:
        """The tokens that were loaded into this pipeline, or one that it was made from, and not unloaded by it."""
        return {token: CreTokConfig(**entry) for token, entry in self.config.get(_CONFIG_KEY, {}).items()}

    def load_cretok(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | CreTok,
        *,
        token: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        hf_token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a token into the tokenizers and the embedding tables of all CLIP text encoders.

        Loading again what is loaded changes nothing; loading another under its name replaces it. Rows for encoders
        that the pipeline has not are left out, so that the CLIP-L row of one base serves another.

        Args:
            pretrained_model_name_or_path: a repository on the Hub, a folder, or a `CreTok`.
            token: what to call it in prompts; default: its own name.
            hf_token: to log in to the Hub with (the name that `load_textual_inversion` has for it).

        Raises:
            CreTokError: there is no CreTok, or it is damaged.
            ValueError: it does not fit the encoders, or the name is taken by something else.
        """
        if isinstance(pretrained_model_name_or_path, CreTok):
            cretok = pretrained_model_name_or_path
        else:
            cretok = CreTok.from_pretrained(
                pretrained_model_name_or_path,  # type: ignore[arg-type]
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=hf_token,
                local_files_only=local_files_only,
            )
        token = token or cretok.config.token
        check_token(token)
        encoders = self._clip_encoders()
        for name, encoder in encoders.items():
            width = cretok.config.encoders.get(name)
            if width != encoder.width:
                has = f"has a row of {width}" if width else "has no row"
                raise ValueError(
                    f"this CreTok {has} for {name}, whose embeddings are {encoder.width} wide: it was trained for "
                    f"{cretok.config.base_class or 'other encoders'} {cretok.config.encoders}, not for this pipeline."
                )
            there = get_row(encoder, token)
            row = cretok.rows[name].to(encoder.table.weight)
            if there is not None and token not in self._described and not torch.equal(there, row):
                raise ValueError(
                    f"token={token!r} is in the vocabulary of {name} and no CreTok of this pipeline: give it another "
                    "name with token=."
                )
        t5_tokenizers(self.components)  # refuses what it could not tell of the token
        trained_for, own = cretok.config.base_class, self.base_class.__name__
        if trained_for not in (None, own):
            logger.warning(f"{token!r} was trained for {trained_for} and is loaded into a {own}.")
        for name, encoder in encoders.items():
            put_row_(encoder, token, cretok.rows[name])
        self._describe(self._described | {token: cretok.config.renamed(token)})

    def unload_cretok(self, tokens: str | Sequence[str] | None = None) -> None:
        """Take tokens out of the tokenizers and the tables again; default: all that are loaded.

        Raises:
            ValueError: a token that is not loaded.
        """
        loaded = self._described
        for token in list(loaded) if tokens is None else [tokens] if isinstance(tokens, str) else tokens:
            if token not in loaded:
                raise ValueError(f"token={token!r} is none of the loaded ones: {list(loaded)}.")
            for encoder in self._clip_encoders().values():
                if get_row(encoder, token) is not None:
                    self._take_out([token], encoder)
            for tokenizer in t5_tokenizers(self.components):
                read_as_(tokenizer, token, None)
            del loaded[token]
        self._describe(loaded)

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """As diffusers'; a CreTok that one text encoder has lost is taken out of the others as well."""
        self._take_out(tokens, ClipEncoder(tokenizer or self.tokenizer, text_encoder or self.text_encoder))
        if lost := self._described.keys() - self.cretok_tokens.keys():
            self.unload_cretok(sorted(lost))

    def _take_out(self, tokens: str | list[str] | None, encoder: ClipEncoder) -> None:
        trained = encoder.table.weight.requires_grad
        super().unload_textual_inversion(tokens, tokenizer=encoder.tokenizer, text_encoder=encoder.model)
        encoder.table.weight.requires_grad_(trained)  # diffusers puts a new table there
        encoder.model.config.vocab_size = len(encoder.table.weight)

    def get_cretok(self, token: str | None = None) -> CreTok:
        """The artefact of a loaded token, its rows as they are in the tables; by default the only one's.

        Raises:
            ValueError: it is not loaded; or several are, and none was named.
        """
        config = self._config_of(token)
        rows = {name: get_row(encoder, config.token) for name, encoder in self._clip_encoders().items()}
        kept = {name: row for name, row in rows.items() if row is not None}
        encoders = {name: len(row) for name, row in kept.items()}
        return CreTok(CreTokConfig(**{**asdict(config), "encoders": encoders}), kept)

    def save_cretok(
        self, save_directory: str | os.PathLike[str], *, token: str | None = None, card: dict[str, Any] | None = None
    ) -> None:
        """Write a loaded token: a few kilobytes, which `load_cretok` and diffusers' `load_textual_inversion` read.

        Args:
            token: which; needed where several are loaded.
            card: for the model card: images (paths of PNG files), results, license, ...
        """
        cretok = self.get_cretok(token)
        cretok.card = card or {}
        cretok.save_pretrained(Path(save_directory))

    def push_cretok(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        card: dict[str, Any] | None = None,
        hf_token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Push a CreTok",
        create_pr: bool = False,
    ) -> str:
        """Push a loaded token to a repository on the Hub, which is made if there is none.

        Returns:
            The address of the commit. For `token` and `card` see `save_cretok`, for `hf_token` `load_cretok`.
        """
        cretok = self.get_cretok(token)
        cretok.card = card or {}
        options = {"private": private, "commit_message": commit_message, "create_pr": create_pr}
        return cretok.push_to_hub(repo_id, token=hf_token, **options)

    def blend_prompt(self, concepts: Sequence[str] = (), *, style: str | None = None, token: str | None = None) -> str:
        """The prompt that blends concepts, or none, with a loaded token; see `prompts.blend_prompt`."""
        config = self._config_of(token)
        return blend_prompt(concepts, style=style, word=config.token, template=config.template)

    def _config_of(self, token: str | None) -> CreTokConfig:
        loaded = self.cretok_tokens
        if token is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if token not in loaded:
            hint = "load one with load_cretok()" if not loaded else f"give one of them as token=: {list(loaded)}"
            raise ValueError(f"token={token!r} names no loaded CreTok: {hint}.")
        return loaded[token]

    def _describe(self, tokens: dict[str, CreTokConfig]) -> None:
        for token, config in tokens.items():
            for tokenizer in t5_tokenizers(self.components):
                read_as_(tokenizer, token, config.plain_word)
        if tokens or self.config.get(_CONFIG_KEY):
            self.register_to_config(**{_CONFIG_KEY: {token: asdict(config) for token, config in tokens.items()}})

    def _clip_encoders(self) -> dict[str, ClipEncoder]:
        encoders = clip_encoders(self.components)
        if not encoders:
            raise ValueError("this pipeline was loaded without a CLIP text encoder, which a CreTok is a row of.")
        return encoders


class CreTokStableDiffusionPipeline(CreTokPipeline, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x: one CLIP encoder."""

    base_class = StableDiffusionPipeline


class CreTokStableDiffusionXLPipeline(CreTokPipeline, StableDiffusionXLPipeline):
    """Stable Diffusion XL: two CLIP encoders."""

    base_class = StableDiffusionXLPipeline


class CreTokStableDiffusion3Pipeline(CreTokPipeline, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5: two CLIP encoders, and T5."""

    base_class = StableDiffusion3Pipeline


class CreTokFluxPipeline(CreTokPipeline, FluxPipeline):
    """Flux.1: one CLIP encoder, of which it sees the pooled embedding only, and T5."""

    base_class = FluxPipeline


FAMILIES: dict[str, type[CreTokPipeline]] = {
    family.base_class.__name__: family
    for family in (
        CreTokStableDiffusionPipeline,
        CreTokStableDiffusionXLPipeline,
        CreTokStableDiffusion3Pipeline,
        CreTokFluxPipeline,
    )
}


def family_of(class_name: str | Sequence[str]) -> type[CreTokPipeline]:
    """The CreTok pipeline for a base, by the class name that its model_index.json has (a list, with custom code).

    Raises:
        ValueError: there is none; the message lists the bases that there are.
    """
    name = class_name if isinstance(class_name, str) else class_name[-1]
    if name not in FAMILIES:
        raise ValueError(f"a CreTok pipeline is made of one of {list(FAMILIES)}, not of {name!r}.")
    return FAMILIES[name]


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
