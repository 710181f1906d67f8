# SPDX-License-Identifier: Apache-2.0
"""Tiny inputs for one call of a transformers model, by what its config says that it reads."""

import inspect
from typing import Any

import torch
import transformers
from torch import nn


_TOKENS, _SAMPLES, _SIDE = 8, 1600, 32


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Inputs of one sample on the model's device; None where nobody can say what they are (as diffusers' models)."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    device, config = model.device, model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = inspect.signature(model.forward).parameters
    tokens = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    vision = getattr(config, "vision_config", config)
    sides = getattr(vision, "image_size", _SIDE)
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    made = {
        "input_ids": lambda: tokens,
        "decoder_input_ids": lambda: tokens,
        "pixel_values": lambda: torch.ones(
            1, getattr(vision, "num_channels", None) or 3, height, width, device=device, dtype=model.dtype
        ),
        "input_values": lambda: torch.ones(1, _SAMPLES, device=device, dtype=model.dtype),
    }
    wanted = [model.main_input_name, *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    wanted += ["input_ids"] if "vision_config" in config and text is not config else []
    chosen: dict[str, Any] = {name: made[name]() for name in dict.fromkeys(wanted) if name in made and name in names}
    if "use_cache" in names:
        chosen["use_cache"] = False
    return chosen or None
