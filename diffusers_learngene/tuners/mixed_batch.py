# SPDX-License-Identifier: Apache-2.0
"""Batches in which every sample has an adapter of its own: PEFT's `adapter_names=` of a forward or of generate.

    model(**inputs, adapter_names=["faces", "churches", "__base__"])

As LoRA has it: in eval mode and unmerged; "__base__" is a sample without an adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .base_config import LearngeneConfig
from .base_layer import LearngeneLayer


BASE = "__base__"


@contextmanager
def adapters_by_sample(model: Any, adapter_names: Sequence[str], num_beams: int = 1) -> Iterator[None]:
    """While it is open, layers compute each sample with the adapter that is named for it, and with no other.

    Args:
        model: with the adapters; no PeftModel, but what is in it.
        adapter_names: one for every sample.
        num_beams: of a beam search, in which every sample stands for so many, except in an encoder before it.

    Raises:
        ValueError: in training mode, names of no adapter, or of one that trained tensors of the model itself, which
            act on every sample.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names={adapter_names!r} must be a list of names, one for every sample.")
    _check_names(model, adapter_names)
    encoder = model.get_encoder() if num_beams > 1 and hasattr(model, "get_encoder") else None
    before = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LearngeneLayer | AuxiliaryTrainingWrapper):
                names = list(adapter_names) if module in before else repeated
                handle = module.register_forward_pre_hook(partial(_hand_on, names), with_kwargs=True)
                stack.callback(handle.remove)  # also when the forward raises
        yield


def _hand_on(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _check_names(model: Any, adapter_names: Sequence[str]) -> None:
    known = {name for layer in model.modules() if isinstance(layer, LearngeneLayer) for name in layer.scaling}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} (not {sorted(known)}).")
    several = set(adapter_names) if len(set(adapter_names)) > 1 else set()
    for name in sorted(several - {BASE}):
        config: LearngeneConfig = model.peft_config[name]
        if config.bias != "none" or config.tensors_to_save:
            raise ValueError(
                f"adapter_names: {name!r} has trained biases or tensors_to_save of the model itself, which would act "
                "on the samples of other adapters, too: use set_adapter, and a batch for each."
            )
