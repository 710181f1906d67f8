# SPDX-License-Identifier: Apache-2.0
"""A token more in CLIP's tokenizers and embedding tables: nothing else of a text encoder is touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


__all__ = ["ClipEncoder", "clip_encoders", "get_row", "load_clip_encoders", "put_row_"]

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
    """Give a token its embedding; it is added to the tokenizer, and the table grown in place, where needed.

    The table keeps its type, device and hooks; no random number is drawn (as `resize_token_embeddings` would).

    Raises:
        ValueError: the weights of the table are elsewhere, as `enable_sequential_cpu_offload` has them.
    """
    table = encoder.table
    if table.weight.is_meta:
        raise ValueError(
            f"the embedding table that {token!r} belongs into is offloaded piece by piece: load tokens before "
            "enable_sequential_cpu_offload(). (enable_model_cpu_offload() can be either before or after.)"
        )
    encoder.tokenizer.add_tokens(token)  # nothing, if it is there
    index = encoder.tokenizer.convert_tokens_to_ids(token)
    if (missing := index + 1 - len(table.weight)) > 0:
        _set_weight_(encoder, torch.cat([table.weight, table.weight.new_zeros(missing, encoder.width)]))
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
