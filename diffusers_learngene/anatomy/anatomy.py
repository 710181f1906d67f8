# SPDX-License-Identifier: Apache-2.0
"""What a model is, read once and handed on.

    model -> stacks -> matrices -> groups      which weights recur, and which of them share a bank
          -> tensors                           all that a model holds, by name
          -> blocks -> ends, uncalled          one block of each kind followed: what ends its residual branches, and
                                               which matrices it reads without calling their layers

Every part is read when it is first asked for, and never again; on the meta device as on any other. A reading is of the
model as it was: whoever changes the model's modules or ties its tensors reads it anew.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .blocks import (
    Group,
    Matrix,
    find_matrices,
    find_stacks,
    group_matrices,
    lists_beside,
    named_matrices,
    target_names,
)
from .kinds import BlockKind, kinds_of_blocks
from .residual import End, Ends
from .table import table
from .tensors import shared_between_blocks, tensors_of


class Anatomy:
    """What a model is; make one with `Anatomy.of(model)`, and print it to see what a learngene would be made of.

    Any diffusers / transformers model will do, also one on the meta device, or with PEFT's adapters, which are seen
    through.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any] | None = None, known_ends: Mapping[str, End] | None = None
    ) -> None:
        self.model, self.inputs, self.known_ends = model, inputs, known_ends or {}

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Mapping[str, Any] | None = None, known_ends: Mapping[str, End] | None = None
    ) -> "Anatomy":
        """The anatomy of a model; of one that is being adapted just now, as it has been read already (`handed_on`).

        Args:
            inputs: arguments of one call of the model, as small as they may be. They are used only if a block cannot
                be followed without numbers; for transformers' models they are made up if not given.
            known_ends: what a real call of a model of another size has shown (`watched_ends`), for blocks that cannot
                be followed in this one.
        """
        known = _HANDED_ON.get()
        return known if known is not None and known.model is model else cls(model, inputs, known_ends)

    @cached_property
    def stacks(self) -> dict[str, nn.Module]:
        """The outermost lists of repeated blocks by module path; empty if the model has none."""
        return find_stacks(self.model)

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many blocks every stack has."""
        return {stack: len(list(blocks.children())) for stack, blocks in self.stacks.items()}

    @cached_property
    def lists(self) -> dict[str, int]:
        """The outermost lists beside the stacks, by path, with their lengths: some have one entry a block."""
        return lists_beside(self.model, self.stacks)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter (tied ones once) and every persistent floating-point buffer by name."""
        return tensors_of(self.model)

    @cached_property
    def shared_ids(self) -> set[int]:
        """ids of the tensors that more than one block of a stack owns (tied embedders)."""
        return shared_between_blocks(self.stacks)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Every matrix that belongs to one block of one stack, in module order.

        Raises:
            ValueError: the model has no repeated blocks.
        """
        if not self.stacks:
            raise ValueError(
                f"{type(self.model).__name__} has no repeated blocks (a ModuleList of which two blocks have half of "
                "their matrices in common, by role and shape), so there is nothing that its layers could share."
            )
        return find_matrices(self.model, self.stacks)

    @cached_property
    def blocks(self) -> list[BlockKind]:
        """One block of each kind, followed."""
        return kinds_of_blocks(self.model, self.stacks, self.inputs)

    @cached_property
    def uncalled(self) -> set[str]:
        """Modules in the blocks whose tensors are read by other modules, which would go past a wrapper.

        Of blocks that cannot be followed, none is known.
        """
        return {
            f"{path}.{name}"
            for kind in self.blocks
            if kind.trace
            for name in kind.trace.read_outside
            for path in kind.paths
        }

    @cached_property
    def ends(self) -> Ends:
        """The tensors that end the residual branches of the blocks (`residual.block_ends`).

        Warns:
            UserWarning: a block cannot be followed, or a branch has no such end. It then has none here.
        """
        found: Ends = {}
        for kind in self.blocks:
            stack = next(stack for stack in self.stacks if kind.paths[0].startswith(f"{stack}."))
            own, known = kind.ends, self._known(stack)
            if (kind.reason or kind.lost) and known:
                own = known
            elif kind.reason or kind.lost:
                reason = kind.reason or f"{kind.lost} of its residual branches end in nothing that scales them alone"
                warnings.warn(
                    f"{kind.cls.__name__}: {reason}. A descendant of another depth keeps these branches as they are, "
                    "so that their sum grows or shrinks with the depth: train it before use. (One call may show "
                    "more: `Anatomy.of(model, inputs)`, `Learngene.condense(model, inputs=)`.)",
                    stacklevel=_level_of_caller(),
                )
            found |= {f"{path}.{name}": end for name, end in own.items() for path in kind.paths}
        return found

    def _known(self, stack: str) -> Ends:
        prefix = f"{stack}.*."
        return {key.removeprefix(prefix): end for key, end in self.known_ends.items() if key.startswith(prefix)}

    @cached_property
    def watched_ends(self) -> Ends:
        """The ends that only a real call has shown, by stack and path in the block, "blocks.*.down.weight"."""
        return {
            f"{stack}.*.{name}": end
            for kind in self.blocks
            if kind.watched
            for stack in self.stacks
            if kind.paths[0].startswith(f"{stack}.")
            for name, end in kind.ends.items()
        }

    @cached_property
    def shareable(self) -> list[Matrix]:
        """The matrices that can be factored: those that are read by calling their layers."""
        return [matrix for matrix in self.matrices if matrix.name not in self.uncalled]

    def check_called(self, names: Iterable[str]) -> None:
        """Raise a ValueError if the model reads one of these layers' weights without calling the layer: whatever is
        put in its place would be dead, or not be what is merged."""
        if dead := sorted(self.uncalled.intersection(names)):
            raise ValueError(
                f"target_modules: {type(self.model).__name__} reads the weight of {dead[0]} without calling the layer "
                f"({len(dead)} like it), so nothing can take its place. Leave it out, by exclude_modules."
            )

    @cached_property
    def experts(self) -> dict[str, Tensor]:
        """Parameters of blocks that are a matrix for each of several experts, (E, m1, m2), by name."""
        inside = tuple(f"{stack}." for stack in self.stacks)
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(inside) and tensor.ndim == 3 and tensor.shape[0] > 1 and min(tensor.shape[1:]) > 1
            if not isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd)
        }

    @cached_property
    def default_targets(self) -> list[str]:
        """Names of all matrices whose group spans two layers or more: what a learngene is made of, what an adapter
        wraps. As role suffixes ("attn1.to_q") where these match nothing else in the model, as full paths otherwise.
        """
        groups = group_matrices(self.shareable)
        return target_names(self.model, [m for group in groups if group.num_layers > 1 for m in group.matrices])

    def groups_of(self, names: Iterable[str], share_qkv: bool = True) -> list[Group]:
        """Group the named matrices; those that lie in no stack are a group of their own each."""
        return group_matrices(named_matrices(self.model, self.stacks, names), share_qkv)

    def __str__(self) -> str:
        if not self.stacks:
            return f"{type(self.model).__name__}: no repeated blocks, nothing that layers could share."
        return table(
            type(self.model).__name__,
            self.tensors,
            self.depths,
            self.matrices,
            self.uncalled,
            self.blocks,
            sum(tensor.numel() for tensor in self.experts.values()),
        )


# Whoever makes a model and then has PEFT adapt it has read it already, but PEFT's classes take no such argument.
_HANDED_ON: ContextVar[Anatomy | None] = ContextVar("anatomy", default=None)


@contextmanager
def handed_on(anatomy: Anatomy) -> Iterator[None]:
    """Inside, `Anatomy.of` gives this reading of its model."""
    token = _HANDED_ON.set(anatomy)
    try:
        yield
    finally:
        _HANDED_ON.reset(token)


def _level_of_caller() -> int:
    """`stacklevel` of the code outside this package that asked: it is whom a warning is for."""
    package, level = __name__.partition(".")[0], 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (package, "functools"):
        frame, level = frame.f_back, level + 1
    return level
