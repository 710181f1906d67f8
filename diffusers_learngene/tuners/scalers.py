# SPDX-License-Identifier: Apache-2.0
"""Several scalers over one bank: a task is a few numbers a layer, and switching it is a copy in place.

    freeze_bank_(model); train(model)
    faces = get_scalers(model)              # safetensors.torch.save_file(faces, "faces.safetensors")
    set_scalers_(model, churches)           # a compiled model is not compiled again

Names are those of the plain model, whether it is wrapped by PEFT or compiled.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from .base_layer import LearngeneLayer


Model = TypeVar("Model", bound=nn.Module)

# What PEFT puts before the names of a model's own tensors in a file.
PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Name that a module has in the plain model."""
    return name.replace("_orig_mod.", "").removeprefix(PREFIX).replace(".base_layer", "")


def adapter_config(model: nn.Module, adapter_name: str) -> PeftConfig:
    """Config of an adapter of a PeftModel, or of a model that it was injected into.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, dict) else {}
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}, only {sorted(configs)}.")
    return configs[adapter_name]


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LearngeneLayer]:
    """The layers with an adapter, in order, by the name of the plain model's layer.

    Raises:
        ValueError: there are none.
    """
    layers = {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LearngeneLayer) and adapter_name in layer.scaling
    }
    if not layers:
        raise ValueError(f"No layer has a learngene adapter {adapter_name!r}.")
    return layers


def target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The layers by name, or, where PEFT would match the end of another name, as a regular expression."""
    every = {plain_name(name) for name, _ in model.named_modules()}
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in every - set(names)):
        return "|".join(re.escape(name) for name in names)
    return names


def get_scalers(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of the scalers of an adapter, by the name of the layer that owns each: FINE's sigma, WAVE's S.

    Raises:
        ValueError: the model has no such adapter.
    """
    return {name: parameter.detach().clone() for name, parameter in _scalers(model, adapter_name).items()}


def set_scalers_(model: Model, scalers: Mapping[str, Tensor], adapter_name: str = "default") -> Model:
    """Copy scalers, as `get_scalers` gives them, into an adapter in place, and return the model.

    Raises:
        ValueError: there is no such adapter, or these are not its scalers: other names, shapes, or values that are not
            finite numbers. Nothing is copied then.
    """
    own = _scalers(model, adapter_name)
    check_tensors("The scalers", scalers, own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(scalers[name])
    return model


def freeze_bank_(model: Model, adapter_name: str = "default") -> Model:
    """Train only the scalers of an adapter from now on, whichever adapter is activated when; return the model.

    Its config says so from now on (`freeze_bank`), so that whoever loads it goes on as it was.

    Raises:
        ValueError: the model has no such adapter.
    """
    for layer in adapted_layers(model, adapter_name).values():
        layer.frozen_peft_weight_names[adapter_name] = layer.adapter_layer_names[:1]
        layer._freeze_non_trainable_peft_weights(adapter_name)
    adapter_config(model, adapter_name).freeze_bank = True
    return model


def check_tensors(source: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless tensors have the names and shapes expected, and finite values."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{source} does not fit the model: missing {missing}, unexpected {unexpected}.")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}.")
        # Whole numbers are counts, as batch norms have them.
        whole = tensor.dtype == expected[name].dtype == torch.int64
        if not whole and not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} holds values that are no finite floating-point numbers.")


def _scalers(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    layers = adapted_layers(model, adapter_name)
    return {name: layer.scaler(adapter_name).weight for name, layer in layers.items() if adapter_name in layer.scalers}
