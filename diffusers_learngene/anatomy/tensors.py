# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model by name, and which of them its blocks share."""

from collections.abc import Mapping

from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter (tied ones once) and every persistent floating-point buffer by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                tensors[f"{path}.{name}" if path else name] = buffer
    return tensors


def shared_between_blocks(stacks: Mapping[str, nn.Module]) -> set[int]:
    """ids of the tensors that more than one block of a stack owns (tied embedders)."""
    seen: dict[int, str] = {}
    shared = set()
    for stack, module in stacks.items():
        for layer, block in module.named_children():
            for tensor in (*block.parameters(), *block.buffers()):
                if seen.setdefault(id(tensor), f"{stack}.{layer}") != f"{stack}.{layer}":
                    shared.add(id(tensor))
    return shared
