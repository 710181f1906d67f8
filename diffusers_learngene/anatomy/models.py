# SPDX-License-Identifier: Apache-2.0
"""A model as data: (architecture, config), and back to an empty diffusers / transformers model.

A config may come from a stranger's file. Building a model from it must neither run anything but the class, nor fetch
anything, nor take memory or time without bound, whatever the config says; `check_config` and `empty_model` see to it.
"""

import inspect
import json
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from .dit import disable_label_dropout_, tie_dit_embedders_


# What is not part of a model's shape, or could make a library fetch or run code. Private keys ("_...") are neither.
_NOT_SHAPE = {"architectures", "transformers_version", "dtype", "torch_dtype", "name_or_path", "task_specific_params"}
_CODE = {"auto_map", "trust_remote_code", "quantization_config", "backbone", "use_pretrained_backbone"}
_LABELS = {"id2label", "label2id"}  # free text

_LABELLED, _LABEL_COUNT = "DiTTransformer2DModel", "num_embeds_ada_norm"  # (PixArt has the key too, without labels)

_MAX_INTEGER = 2**20
_MAX_LENGTH = 2**27  # of what takes little each: positions and words
_LENGTH = re.compile(r".*(position|length|theta|window|vocab|context|token|seq).*")
_MAX_SIDE = 2**14  # of a picture, whose area counts
_SIDE = re.compile(r"(?!.*vocab)(.*_)?(image|sample|window|patch|kernel|crop|pos_embed_max)_(size|width|height)")
_SIZE = re.compile(r"(.*_)?(sizes?|heads?|dims?|channels|embeddings|positions|model|embd)")
_MAX_COUNT = 4096  # blocks, experts: each is a Python object
_COUNT = re.compile(r"(num|n)_(.*_)?(layers?|blocks|experts)|(.*_)?depths?|layers_.*")
_MAX_COMPUTED = 2**27  # numbers in position tables and the like, which a class computes when it is built


def model_class(architecture: str) -> type[Any]:
    """The public model class of that name in diffusers or transformers.

    Raises:
        ValueError: there is no such class, or it is not a model class.
    """
    name = architecture if isinstance(architecture, str) and architecture.isidentifier() else ""
    for library, base in ((diffusers, diffusers.ModelMixin), (transformers, transformers.PreTrainedModel)):
        found = getattr(library, name, None)
        if inspect.isclass(found) and issubclass(found, base):
            return found
    raise ValueError(f"architecture={architecture!r} is not a model class of diffusers or transformers.")


def model_config(model: Any) -> dict[str, Any]:
    """The JSON-able config from which `empty_model` makes a model of the same shape.

    Raises:
        ValueError: the model is neither a diffusers nor a transformers model.
    """
    model_class(type(model).__name__)
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    config.pop("model_type", None)
    return json.loads(json.dumps(_shape_of(config), default=list))


def _shape_of(config: dict) -> dict:
    return {
        key: _shape_of(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _NOT_SHAPE | _CODE
    }


def check_config(config: Any, key: str = "", *, most: int = _MAX_COUNT) -> None:
    """Refuse configs that name code, a path or an address, or whose sizes are absurd, before anything is built.

    Args:
        config: a config or, when it calls itself, a value in it.
        key: of that value.
        most: entries of a list, blocks, experts.

    Raises:
        ValueError: naming the key and the value.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            if name in _CODE | _NOT_SHAPE or name.startswith("_"):
                raise ValueError(f"base_config: {name!r} is not allowed in it: a learngene is data only.")
            if name not in _LABELS:
                check_config(value, name, most=most)
    elif isinstance(config, list | tuple):
        if len(config) > most:
            raise ValueError(f"base_config: {key!r} is out of range: {len(config)} entries, more than {most}.")
        for value in config:
            check_config(value, key, most=most)
    elif isinstance(config, str) and any(mark in config for mark in "/\\:"):
        raise ValueError(f"base_config: {key}={config!r} is not allowed: a learngene names no paths or addresses.")
    elif isinstance(config, int | float):
        _check_number(key, config, most)


def _check_number(key: str, value: float, most: int) -> None:
    """Refuse a number that no model has, by what its key says that it counts."""
    count = _COUNT.fullmatch(key)
    size = count or _SIDE.fullmatch(key) or _SIZE.fullmatch(key)
    if isinstance(value, bool):
        if count:
            raise ValueError(f"base_config: {key}={value} must be a whole number.")
        return
    if count:
        limit = most
    elif _SIDE.fullmatch(key):
        limit = _MAX_SIDE
    else:
        limit = _MAX_LENGTH if _LENGTH.fullmatch(key) else _MAX_INTEGER
    out = abs(value) > limit if isinstance(value, int) else math.isnan(value) or count
    if out or size and value < 0:
        raise ValueError(f"base_config: {key}={value} is out of range.")


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """What is drawn inside, from torch, numpy or Python, leaves no trace outside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def new_model(architecture: str, config: dict) -> Any:
    """A model of that architecture and config as its class initialises it."""
    cls = model_class(architecture)
    return cls(**config) if issubclass(cls, diffusers.ModelMixin) else cls(cls.config_class.from_dict(config))


def empty_model(architecture: str, config: dict) -> Any:
    """A model of that architecture and config without memory for its parameters (they are on the meta device).

    Buffers (fixed position tables) are real. DiT's embedders are tied, and its own label dropout is off.

    Raises:
        ValueError: unknown architecture or config key, or sizes that the architecture itself refuses.
    """
    model_class(architecture)
    check_config(config)
    try:
        numbers = _computed_numbers(architecture, config)
        if numbers > _MAX_COMPUTED:
            raise ValueError(f"its tables would hold {numbers} numbers, more than {_MAX_COMPUTED}")
        with unchanged_random_state(), no_init_weights(), init_empty_weights(include_buffers=False):
            model = new_model(architecture, config)
    except Exception as error:  # of whatever kind: it is the class's answer to this config
        raise ValueError(f"{architecture} cannot be built from this config: {error}") from error
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()  # `init_empty_weights` makes every parameter anew
    return prepare_ancestry_(model)


def _computed_numbers(architecture: str, config: dict) -> int:
    """How many numbers a model holds outside its parameters, found without memory for them."""
    try:
        with unchanged_random_state(), no_init_weights(), torch.device("meta"):
            modules = list(new_model(architecture, config).modules())
    except (NotImplementedError, RuntimeError):  # a class that looks at the numbers while it is being built
        return 0
    attributes = (vars(module) | {"_parameters": None, "_modules": None} for module in modules)
    return sum(_numbers(list(values.values())) for values in attributes)


def _numbers(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_numbers, parts))


def prepare_ancestry_(model: nn.Module) -> nn.Module:
    """Undo in place what an architecture's class does to training; it computes the same afterwards (see `dit`).

    Raises:
        ValueError: a DiT whose blocks have different embedders.
    """
    if isinstance(model, diffusers.DiTTransformer2DModel):
        disable_label_dropout_(tie_dit_embedders_(model))
    return model


def num_labels(architecture: str, config: dict) -> int | None:
    """How many classes a model has labels for, without the null class; None if it has no labels."""
    return config.get(_LABEL_COUNT) if architecture == _LABELLED else None


def with_labels(architecture: str, config: dict, count: int) -> dict:
    """`config` of a model with labels for that many classes; as it is, if it has no labels."""
    return {**config, _LABEL_COUNT: count} if architecture == _LABELLED else config


def enable_gradient_checkpointing_(model: Any) -> None:
    """Recompute every block in the backward pass; the libraries, and transformers' versions, name it differently.

    Raises:
        ValueError: a model that has no such switch.
    """
    for name in ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise ValueError(f"{type(model).__name__} has no gradient checkpointing.")
