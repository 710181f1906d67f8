# SPDX-License-Identifier: Apache-2.0
"""One block of each kind in a model, and what its forward does: the others of its kind do the same."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .residual import Ends, block_ends
from .tracing import Trace, TracingError, trace


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one class and one set of shapes: their paths, and what the forward of one of them does.

    Attributes:
        trace: None where the forward cannot be followed; `reason` says why.
        ends: of one block, by the names of its tensors (`residual.block_ends`).
        lost: residual branches that end in nothing which scales them alone.
    """

    cls: type[nn.Module]
    paths: list[str]
    trace: Trace | None
    ends: Ends
    lost: int = 0
    reason: str = ""


def kinds_of_blocks(stacks: Mapping[str, nn.Module]) -> list[BlockKind]:
    """One block of each kind in the stacks of a model, followed, with the paths of all blocks of its kind."""
    kinds: dict[tuple, tuple[nn.Module, list[str]]] = {}
    for stack, blocks in stacks.items():
        for layer, block in blocks.named_children():
            kind = (stack, type(block), *((name, tensor.shape) for name, tensor in block.named_parameters()))
            kinds.setdefault(kind, (block, []))[1].append(f"{stack}.{layer}")
    return [_followed(block, paths) for block, paths in kinds.values()]


def _followed(block: nn.Module, paths: list[str]) -> BlockKind:
    try:
        found = trace(block)
    except TracingError as error:
        return BlockKind(type(block), paths, None, {}, reason=str(error))
    ends, lost = block_ends(block, found.outputs)
    return BlockKind(type(block), paths, found, ends, lost)
