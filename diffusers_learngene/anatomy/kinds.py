# SPDX-License-Identifier: Apache-2.0
"""One block of each kind in a model, and what its forward does: the others of its kind do the same."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .examples import example_inputs
from .nodes import Trace, TracingError
from .recorded import recorded_traces
from .residual import Ends, block_ends
from .tracing import trace


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one class and one set of shapes: their paths, and what the forward of one of them does.

    Attributes:
        trace: None where the forward cannot be followed; `reason` says why.
        ends: of one block, by the names of its tensors (`residual.block_ends`).
        lost: residual branches that end in nothing which scales them alone.
        watched: whether all this was seen in a real call.
    """

    cls: type[nn.Module]
    paths: list[str]
    trace: Trace | None
    ends: Ends
    lost: int = 0
    reason: str = ""
    watched: bool = False


def kinds_of_blocks(
    model: nn.Module, stacks: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None = None
) -> list[BlockKind]:
    """One block of each kind in the stacks of a model, followed, with the paths of all blocks of its kind.

    Where a block cannot be followed without numbers, or not to the end of all its branches, one real call of the model
    is watched instead.

    Args:
        inputs: of that call; default: `examples.example_inputs`.
    """
    kinds: dict[tuple, tuple[nn.Module, list[str]]] = {}
    for stack, blocks in stacks.items():
        for layer, block in blocks.named_children():
            kind = (stack, type(block), *((name, tensor.shape) for name, tensor in block.named_parameters()))
            kinds.setdefault(kind, (block, []))[1].append(f"{stack}.{layer}")
    found = [_followed(block, paths) for block, paths in kinds.values()]
    unread = {kind.paths[0]: index for index, kind in enumerate(found) if kind.reason or kind.lost}
    for path, trace_of in _recorded(model, inputs, unread).items() if unread else ():
        known = found[unread[path]]
        watched = replace(_kind(model.get_submodule(path), known.paths, trace_of), watched=True)
        if known.reason or watched.lost < known.lost:
            found[unread[path]] = watched
    return found


def _recorded(model: nn.Module, inputs: Mapping[str, Any] | None, paths: Collection[str]) -> dict[str, Trace]:
    """What these blocks do in a real call; nothing if nobody knows inputs of the model, or it cannot run on them."""
    given = example_inputs(model) if inputs is None else inputs
    if given is None:
        return {}
    try:
        return recorded_traces(model, given, paths)
    except Exception:  # of whatever kind: it is the model's own code, and maybe on the meta device
        if inputs is not None:
            raise
        return {}


def _followed(block: nn.Module, paths: list[str]) -> BlockKind:
    try:
        found = trace(block)
    except TracingError as error:
        return BlockKind(type(block), paths, None, {}, reason=str(error))
    return _kind(block, paths, found)


def _kind(block: nn.Module, paths: list[str], found: Trace) -> BlockKind:
    ends, lost = block_ends(block, found.outputs)
    return BlockKind(type(block), paths, found, ends, lost)
