# SPDX-License-Identifier: Apache-2.0
"""A token more in CLIP's tokenizers and embedding tables, and a word for it in T5's tokenizer: nothing else of a text
encoder is touched."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import Regex, normalizers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel


__all__ = ["ClipEncoder", "clip_encoders", "get_row", "load_clip_encoders", "put_row_", "read_as_", "t5_tokenizers"]

_CLIP_CLASSES: dict[str, Any] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


@dataclass(frozen=True)
class ClipEncoder:
    """A CLIP text encoder of a pipeline and the tokenizer that goes with it."""

    tokenizer: Any
    model: Any

    @property
    def table(self) -> nn.Embedding:
        """The token embeddings."""
        return self.model.get_input_embeddings()

    @property
    def width(self) -> int:
        """Numbers in a row of `table`."""
        return self.table.weight.shape[1]


def clip_encoders(components: Mapping[str, Any]) -> dict[str, ClipEncoder]:
    """The CLIP text encoders among a pipeline's components, by component name: "text_encoder", "text_encoder_2".

    T5 is none: CreTok lives in CLIP's embedding space. An encoder that the pipeline was loaded without is left out.
    """
    found = {}
    for suffix in ("", "_2", "_3"):
        tokenizer, model = components.get(f"tokenizer{suffix}"), components.get(f"text_encoder{suffix}")
        if tokenizer is not None and isinstance(model, tuple(_CLIP_CLASSES.values())):
            found[f"text_encoder{suffix}"] = ClipEncoder(tokenizer, model)
    return found


def get_row(encoder: ClipEncoder, token: str) -> Tensor | None:
    """The embedding (width,) of an added token; None if the tokenizer does not know it."""
    index = encoder.tokenizer.get_vocab().get(token)
    return None if index is None else encoder.table.weight[index].detach()


@torch.no_grad()
def put_row_(encoder: ClipEncoder, token: str, row: Tensor) -> None:
    """Give a token its embedding; it is added to the tokenizer, and a row to the table in place, where needed.

    A table may have more rows than the tokenizer has words. None of them is used up: they move down, and are what and
    where they were when the token is taken out. The table keeps its type, device and hooks; no random number is drawn
    (as `resize_token_embeddings` would).

    Raises:
        ValueError: the weights of the table are elsewhere, as `enable_sequential_cpu_offload` has them.
    """
    table = encoder.table
    if table.weight.is_meta:
        raise ValueError(
            f"the embedding table that {token!r} belongs into is offloaded piece by piece: load tokens before "
            "enable_sequential_cpu_offload(). (enable_model_cpu_offload() can be either before or after.)"
        )
    new = bool(encoder.tokenizer.add_tokens(token))
    index = encoder.tokenizer.convert_tokens_to_ids(token)
    if (missing := index + (not new) - len(table.weight)) > 0:
        _set_weight_(encoder, torch.cat([table.weight, table.weight.new_zeros(missing, encoder.width)]))
    if new:
        above, below = table.weight[:index], table.weight[index:]
        _set_weight_(encoder, torch.cat([above, table.weight.new_zeros(1, encoder.width), below]))
    table.weight[index] = row.to(table.weight)
    _pool_at_the_end_(encoder)


def _set_weight_(encoder: ClipEncoder, weight: Tensor) -> None:
    table = encoder.table
    table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    encoder.model.config.vocab_size = table.num_embeddings = len(weight)


def _pool_at_the_end_(encoder: ClipEncoder) -> None:
    # Configs older than transformers 4.31, among them those of SD 1.x, SDXL, SD3 and Flux as published, name 2 as the
    # end token, which transformers reads as "pool at the highest token id". That is the end token's, until a token is
    # added: then the pooled embedding would be read where the new token stands.
    end = encoder.tokenizer.eos_token_id
    if encoder.model.config.eos_token_id == 2 != end:
        encoder.model.config.eos_token_id = end
        for module in encoder.model.modules():
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = end


def t5_tokenizers(components: Mapping[str, Any]) -> list[Any]:
    """The tokenizers of the T5 encoders among a pipeline's components.

    Raises:
        ValueError: one that is none of the tokenizers library, and takes no rules (`read_as_`).
    """
    names = [name for name, model in components.items() if isinstance(model, T5EncoderModel)]
    found = [components.get(name.replace("text_encoder", "tokenizer")) for name in names]
    for tokenizer in found:
        if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"T5's {type(tokenizer).__name__} has no backend_tokenizer, which could read a plain word for a "
                "token: load it as AutoTokenizer does, or the pipeline without T5."
            )
    return [tokenizer for tokenizer in found if tokenizer is not None]


# A comment, by which our rules are told from a tokenizer's own; and upper and lower case are alike, as CLIP has them.
_OURS = "(?#cretok)(?i)"


def read_as_(tokenizer: Any, token: str, word: str | None) -> None:
    """Let a tokenizer whose encoder has no row of a token read a word in its place, in all that share it; None: no
    more."""
    backend: Any = tokenizer.backend_tokenizer
    now: Any = backend.normalizer
    rules: dict[str, str] = {}
    others = []
    parts: Any = now if isinstance(now, normalizers.Sequence) else [] if now is None else [now]
    for part in parts:
        state = json.loads(part.__getstate__())  # parts are not asked for their fields otherwise
        pattern = state["pattern"].get("Regex", "") if state["type"] == "Replace" else ""
        if pattern.startswith(_OURS):
            rules[pattern] = state["content"]
        else:
            others.append(part)
    rules.pop(_OURS + re.escape(token), None)
    if word is not None:
        rules[_OURS + re.escape(token)] = word
    longest_first = sorted(rules.items(), key=lambda rule: -len(rule[0]))
    parts = [*(normalizers.Replace(Regex(pattern), content) for pattern, content in longest_first), *others]
    backend.normalizer = parts[0] if len(parts) == 1 else normalizers.Sequence(parts) if parts else None


def load_clip_encoders(
    pretrained_model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[str, dict[str, ClipEncoder]]:
    """The CLIP text encoders of a pipeline and its class name; nothing else of it is fetched or takes memory.

    Args:
        pretrained_model_name_or_path: a pipeline, or what is there of one: model_index.json and these components.
        dtype: of the encoders, which are frozen.

    Raises:
        ValueError: no pipeline, or one without a CLIP text encoder.
    """
    options = {"revision": revision} if revision else {}
    try:
        index = DiffusionPipeline.load_config(pretrained_model_name_or_path, **options)
    except OSError as error:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} holds no pipeline: there is no model_index.json ({error})."
        ) from error
    encoders = {}
    for name, entry in index.items():
        kind = entry[1] if name.startswith("text_encoder") and isinstance(entry, list) else None
        if kind not in _CLIP_CLASSES:
            continue
        tokenizer = CLIPTokenizer.from_pretrained(
            pretrained_model_name_or_path, subfolder=name.replace("text_encoder", "tokenizer"), **options
        )
        model = _CLIP_CLASSES[kind].from_pretrained(
            pretrained_model_name_or_path, subfolder=name, variant=variant, dtype=dtype, **options
        )
        encoders[name] = ClipEncoder(tokenizer, model.to(device).eval().requires_grad_(False))
    if not encoders:
        name = str(pretrained_model_name_or_path)
        raise ValueError(f"{name!r} has no CLIP text encoder, which a CreTok is a row of.")
    return index["_class_name"], encoders
