# SPDX-License-Identifier: Apache-2.0
"""A model as data: (architecture, config), and back to an empty diffusers / transformers model."""

import inspect
import json

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from .dit import disable_label_dropout_, tie_dit_embedders_


# What is not part of a model's shape, and what could make a library fetch or run code (never taken from a file).
_IGNORED = {"architectures", "transformers_version", "dtype", "torch_dtype", "name_or_path", "model_type"}
_FORBIDDEN = {"auto_map", "trust_remote_code", "quantization_config", "custom_pipelines"}
_MAX_INT, _MAX_DEPTH = 2**31, 4096


def model_class(architecture: str) -> type[nn.Module]:
    """The public model class of that name in diffusers or transformers.

    Raises:
        ValueError: there is no such class, or it is not a model class.
    """
    for library, base in ((diffusers, diffusers.ModelMixin), (transformers, transformers.PreTrainedModel)):
        found = getattr(library, architecture, None) if str(architecture).isidentifier() else None
        if inspect.isclass(found) and issubclass(found, base):
            return found
    raise ValueError(f"architecture={architecture!r} is not a model class of diffusers or transformers.")


def model_config(model: nn.Module) -> dict:
    """The JSON-able config from which `empty_model` makes a model of the same shape.

    Raises:
        ValueError: the model is neither a diffusers nor a transformers model.
    """
    model_class(type(model).__name__)
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    config = {key: value for key, value in config.items() if not key.startswith("_") and key not in _IGNORED}
    return json.loads(json.dumps(config, default=list))


def check_config(config: dict) -> None:
    """Refuse configs that name code, or whose sizes are absurd, before anything is built from them.

    Raises:
        ValueError: naming the key and the value.
    """
    for key, value in config.items():
        if key in _FORBIDDEN or key.startswith("_"):
            raise ValueError(f"base_config[{key!r}]={value!r} is not allowed: a learngene is data only.")
        deep = isinstance(value, int) and ("layers" in key or "depth" in key) and value > _MAX_DEPTH
        if isinstance(value, int) and (abs(value) > _MAX_INT or deep):
            raise ValueError(f"base_config[{key!r}]={value} is out of range.")
        if isinstance(value, dict):
            check_config(value)


def empty_model(architecture: str, config: dict) -> nn.Module:
    """A model of that architecture and config without memory for its parameters (they are on the meta device).

    Buffers (fixed position tables) are real. DiT's embedders are tied, and its own label dropout is off.

    Raises:
        ValueError: unknown architecture or config key, or sizes that the architecture itself refuses.
    """
    cls = model_class(architecture)
    check_config(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(**config) if issubclass(cls, diffusers.ModelMixin) else cls(cls.config_class.from_dict(config))
    except (AssertionError, ZeroDivisionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{architecture} cannot be built from this config: {error}") from error
    return prepare_ancestry_(model)


def prepare_ancestry_(model: nn.Module) -> nn.Module:
    """Undo in place what an architecture's class does to training; it computes the same afterwards (see `dit`)."""
    if isinstance(model, diffusers.DiTTransformer2DModel):
        disable_label_dropout_(tie_dit_embedders_(model))
    return model


def override_config(architecture: str, config: dict, overrides: dict) -> dict:
    """`config` with `overrides`, whose keys must be keys of the config.

    Raises:
        ValueError: unknown key, non-positive size, or a width that the attention heads do not divide.
    """
    for key, value in overrides.items():
        if key not in config:
            near = sorted(k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool))
            raise ValueError(f"{architecture} has no config key {key!r}. Its sizes are: {', '.join(near)}.")
        if isinstance(config[key], int) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key}={value!r} must be a positive integer (it is {config[key]!r} in the learngene).")
    merged = {**config, **overrides}
    width, heads = merged.get("hidden_size"), merged.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and not merged.get("head_dim") and width % heads:
        raise ValueError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}.")
    return merged


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter (tied ones once) and every persistent floating-point buffer by name."""
    tensors = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                tensors[f"{path}.{name}" if path else name] = buffer
    return tensors


def depth_key(config: dict) -> str:
    """The config key that says how many blocks there are.

    Raises:
        ValueError: the config has none by a known name.
    """
    for key in ("num_layers", "num_hidden_layers", "n_layer"):
        if key in config:
            return key
    raise ValueError(f"this config names its depth in another way: {sorted(config)}.")


def width_overrides(config: dict, heads: int) -> dict:
    """Config overrides for a width of that many heads of the same head dimension; empty for the width as it is.

    Understands both ways of saying a width: heads x attention_head_dim (diffusers), and hidden_size with its
    intermediate_size (transformers).
    """
    old = config["num_attention_heads"]
    if heads == old:
        return {}
    scaled = ("hidden_size", "intermediate_size", "num_key_value_heads")
    sizes = {key: config[key] * heads // old for key in scaled if isinstance(config.get(key), int)}
    return {"num_attention_heads": heads, **sizes}


def size_overrides(config: dict, depth: int, heads: int) -> dict:
    """Config overrides for a depth and a width of that many heads."""
    return {depth_key(config): depth, **width_overrides(config, heads)}


def enable_gradient_checkpointing_(model: nn.Module) -> None:
    """Recompute every block in the backward pass; the libraries name it differently."""
    if isinstance(model, transformers.PreTrainedModel):
        model.gradient_checkpointing_enable()
    else:
        model.enable_gradient_checkpointing()
