# SPDX-License-Identifier: Apache-2.0
"""Where the residual branches of a model's blocks end: what has to be scaled so that a branch is.

A block adds branches to a residual stream, x + f(x) (`sums`). From f(x), the way goes back over whatever is linear -
reshaping, dropout, gates - to the first tensors that can scale it:

    x + gate * to_out(attention(x))     to_out's weight and bias
    x + norm(down(ffn(x)))              the norm's weight and bias; scaling `down` would be normalised away
    x + (1 + w) * normalised            w, as g (1 + w) - 1: an "added" 1
    norm(x + f(x))                      as x + f(x): the stream is normalised after each sum, the branch is not; it is
                                        said, because another gain serves it (`functional.resize.residual_gain`)
    x + gate * (y + h(y))               what scales y, if h is linear; h's own weights would scale it twice

What is found is checked: the branch must be of degree one in these tensors, and nothing else in the block may depend
on them. A branch for which that fails is scaled by nothing, with a warning (`anatomy`), rather than by a guess.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .nodes import Node, words
from .sums import (
    FIRST,
    JOINED,
    NORMS,
    PRODUCTS,
    SUMS,
    ResidualSum,
    behind,
    nodes_of,
    residual_sums,
    residual_terms,
    stripped,
)


# Layers: the numbers of their weight and their bias.
_LAYERS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), (1, 2)),
    **dict.fromkeys(("layer_norm", "group_norm"), (2, 3)),
    **dict.fromkeys(("batch_norm", "instance_norm"), (3, 4)),
    "rms_norm": (2,),
    "addmm": (2, 0),
    "multi_head_attention_forward": (11, 12),
}
_ZEROS = words("zeros zeros_like new_zeros empty_like new_empty")


@dataclass(frozen=True)
class End:
    """How a tensor ends a residual branch.

    Attributes:
        added: what the model adds to it before it multiplies: 1 for norms that multiply by 1 + w, else 0.
        normed: whether the stream is normalised right after the sum (post-norm, as in BERT).
    """

    added: float = 0.0
    normed: bool = False

    def scaled(self, tensor: Tensor, gain: float) -> Tensor:
        """The tensor that makes the branch `gain` times what it was."""
        return tensor * gain + self.added * (gain - 1) if self.added else tensor * gain


Ends = dict[str, End]  # by the name of a tensor
_Added = dict[str, float]  # `End.added` alone


def block_ends(block: nn.Module, outputs: list[Node]) -> tuple[Ends, int]:
    """The tensors of a block that end its residual branches, and how many branches end in no such tensor.

    Args:
        outputs: what the block's forward returns, as `tracing.trace` has it.
    """
    sums, lost = residual_sums(outputs)
    ends, without = _checked(outputs, sums)
    return ends | {name: ends[twin] for name, twin in _twins(block, ends, outputs)}, lost + without


def _checked(outputs: list[Node], sums: list[ResidualSum]) -> tuple[Ends, int]:
    """The ends of all branches, without those on which more depends than their branches; and how many have none.

    A branch whose ends another one needs as well (a gate of two) is looked at once more, without these.
    """
    kept = _kept(outputs, sums, [_scaled_by(one.branch, one.stream) for one in sums])
    if not all(kept):
        taken = {name for one in sums for name in _scaled_by(one.branch, one.stream) or ()}
        taken -= {name for ends in kept if ends for name in ends}
        again = [ends or _scaled_by(one.branch, one.stream, taken) for ends, one in zip(kept, sums, strict=True)]
        kept = max(kept, _kept(outputs, sums, again), key=lambda found: sum(map(bool, found)))
    ends = {
        name: End(added, one.normed) for own, one in zip(kept, sums, strict=True) if own for name, added in own.items()
    }
    return ends, sum(not own for own in kept)


def _kept(outputs: list[Node], sums: list[ResidualSum], found: Sequence[_Added | None]) -> list[_Added | None]:
    """Of the ends of each sum's branch, those on which nothing else in the block depends."""
    branches = [one.branch for one in sums]
    free = _names(behind(outputs, {branch for branch, ends in zip(branches, found, strict=True) if ends}))
    for index, ends in enumerate(found):
        others = [set(other or ()) for place, other in enumerate(found) if place != index]
        if ends and any(ends.keys() != other for other in others if ends.keys() & other):
            free |= ends.keys()
    kept = [ends if ends and not ends.keys() & free else None for ends in found]
    held = {name for ends in kept if ends for name in ends}
    for index, (branch, ends) in enumerate(zip(branches, kept, strict=True)):
        if ends and _names(behind([branch], set(branches) - {branch})) & (held - ends.keys()):
            kept[index] = None
    return kept


def _scaled_by(node: Node, stream: Node, taken: Collection[str] = ()) -> _Added | None:
    """Tensors in which a node is of degree one; none at all for a zero; None if there are none for another node.

    Args:
        taken: names of tensors that cannot be among them.
    """
    ends = _degree_one(node, stream, taken)
    return None if ends and not ends.keys().isdisjoint(taken) else ends


def _degree_one(node: Node, stream: Node, taken: Collection[str]) -> _Added | None:
    if node.op == "tensor":
        return {node.name: 0.0}
    if node.op in _ZEROS:
        return {}
    if node.op in _LAYERS:
        parts = [_argument(node, number, name) for number, name in zip(_LAYERS[node.op], _NAMES, strict=False)]
        return _all(parts[:1] + [part for part in parts[1:] if part is not None], stream, taken)
    if node.op in FIRST:
        return _all(node.args[:1], stream, taken)
    if node.op in JOINED:
        return _all(nodes_of(node.args[:1]), stream, taken)
    if node.op in SUMS:
        if (inner := residual_terms(node)) and (ends := _inner_sum(*inner, stream, taken)) is not None:
            return ends
        terms = [_argument(node, number, _SOURCES[number]) for number in SUMS[node.op]]
        return _offset(terms, stream, taken) if node.op == "add" else _all(terms, stream, taken)
    if node.op in PRODUCTS:
        factors = sorted(node.inputs(), key=lambda factor: stream not in behind([factor]))
        for factor in factors:
            ends = _scaled_by(factor, stream, taken)
            rest = [other for other in factors if other is not factor]
            if ends is not None and not ends.keys() & _names(behind(rest)) and len(rest) == len(factors) - 1:
                return ends
    return None


_NAMES = ("weight", "bias")
_SOURCES = {0: "input", 1: "other", 2: "value", 3: "source"}


def _argument(node: Node, number: int, name: str) -> object:
    """An argument by its number or its name."""
    return node.args[number] if number < len(node.args) else node.kwargs.get(name, node.kwargs.get("src"))


def _inner_sum(inner: Node, branch: Node, stream: Node, taken: Collection[str]) -> _Added | None:
    """What scales y + h(y) inside a branch: what scales y, and what h adds, if h is linear in y."""
    ends, offsets = _scaled_by(inner, stream, taken), _offsets(branch, stripped(inner))
    return None if not ends or offsets is None else ends | offsets


def _offsets(node: Node, source: Node) -> _Added | None:
    """The biases that have to be scaled for a node to be of degree one in `source`; None if it is of another."""
    if node is source:
        return {}
    if node.op in _LAYERS and node.op not in NORMS:
        bias = _argument(node, _LAYERS[node.op][-1], "bias")
        inside = _offsets(node.args[0], source) if type(node.args[0]) is Node else None
        if inside is None or (isinstance(bias, Node) and bias.op != "tensor"):
            return None
        return inside | ({bias.name: 0.0} if isinstance(bias, Node) else {})
    if node.op in FIRST and type(node.args[0]) is Node:
        return _offsets(node.args[0], source)
    if node.op in PRODUCTS:
        made = [factor for factor in node.inputs() if source in behind([factor])]
        return _offsets(made[0], source) if len(made) == 1 else None
    return None


def _all(terms: Collection[object], stream: Node, taken: Collection[str]) -> _Added | None:
    """What scales every term; numbers are scaled by nothing, unless they are zero."""
    ends: _Added = {}
    for term in terms:
        if type(term) is not Node:
            if isinstance(term, int | float) and term == 0:
                continue
            return None
        own = _scaled_by(term, stream, taken)
        if own is None or any(ends.get(name, added) != added for name, added in own.items()):
            return None
        ends |= own
    return ends


def _offset(terms: list, stream: Node, taken: Collection[str]) -> _Added | None:
    """What scales a sum; of a tensor and a number, the tensor with the number added."""
    numbers = [term for term in terms if isinstance(term, int | float)]
    if len(numbers) != 1:
        return _all(terms, stream, taken)
    ends = _all([term for term in terms if type(term) is Node], stream, taken)
    return {next(iter(ends)): float(numbers[0])} if ends and list(ends.values()) == [0.0] else None


def _names(nodes: Collection[Node]) -> set[str]:
    return {node.name for node in nodes if node.op == "tensor"}


def _twins(block: nn.Module, ends: Ends, outputs: list[Node]) -> Iterator[tuple[str, str]]:
    """Tensors of experts like one that was followed, each with that one's: which of them runs depends on the data."""
    read = _names(behind(outputs))
    for name in ends:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            for other, _ in block.named_parameters():
                pattern = re.escape(name[: number.start()]) + r"\d+" + re.escape(name[number.end() :])
                if other not in read and re.fullmatch(pattern, other):
                    yield other, name
