# SPDX-License-Identifier: Apache-2.0
"""Where the residual branches of a model's blocks end: what has to be scaled so that a branch is.

A block adds branches to a residual stream, x + f(x). What its forward does is followed (`tracing`); going back from
its outputs, every sum of which one term is made of the other is such a place. From f(x), the way goes back over
whatever is linear - reshaping, dropout, gates - to the first tensors that can scale it:

    x + gate * to_out(attention(x))     to_out's weight and bias
    x + norm(down(ffn(x)))              the norm's weight and bias; scaling `down` would be normalised away
    x + (1 + w) * normalised            w, as g (1 + w) - 1: an "added" 1
    norm(x + f(x))                      as x + f(x): the stream is normalised after each sum, the branch is not

What is found is checked: the branch must be of degree one in these tensors, and nothing else in the block may depend
on them. A branch for which that fails is scaled by nothing, with a warning (`anatomy`), rather than by a guess.
"""

import re
from collections.abc import Collection, Iterator

from torch import nn

from .tracing import Node, words


# By the number of the argument in which a torch function is linear, or of those whose sum it is linear in.
_FIRST = words(
    "bfloat16 broadcast_to chunk clone contiguous cpu cuda data detach div dropout dropout1d dropout2d dropout3d "
    "expand expand_as feature_dropout flatten flip float gather getitem half index_select mT mean movedim moveaxis "
    "nan_to_num narrow neg pad permute real repeat repeat_interleave reshape reshape_as roll select split "
    "split_with_sizes squeeze sum swapaxes swapdims t T tensor_split tile to transpose true_divide truediv type "
    "type_as unbind unflatten unsqueeze view view_as"
)
_JOINED = words("cat concat concatenate hstack stack vstack")
_SUMS = {
    **dict.fromkeys(("add", "sub"), (0, 1)),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter_reduce", "scatter"), (0, 3)),
    **dict.fromkeys(("index_put", "setitem", "masked_scatter"), (0, 2)),
    "where": (1, 2),
}
_PRODUCTS = words("bmm einsum mm mul multiply matmul _grouped_mm grouped_mm")
# Layers: the numbers of their weight and their bias.
_LAYERS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), (1, 2)),
    **dict.fromkeys(("layer_norm", "group_norm"), (2, 3)),
    **dict.fromkeys(("batch_norm", "instance_norm"), (3, 4)),
    "rms_norm": (2,),
    "addmm": (2, 0),
    "multi_head_attention_forward": (11, 12),
}
_NORMS = words("layer_norm rms_norm group_norm batch_norm instance_norm")
_ZEROS = words("zeros zeros_like new_zeros empty_like new_empty")

Ends = dict[str, float]  # by the name of a tensor, what is added to it before it is multiplied


def block_ends(block: nn.Module, outputs: list[Node]) -> tuple[Ends, int]:
    """The tensors of a block that end its residual branches, and how many branches end in no such tensor.

    To scale all branches by g is to make each of these tensors, w, g (w + a) - a, where a is its value here: 1 for
    norms that multiply by 1 + w, 0 for all others.

    Args:
        outputs: what the block's forward returns, as `tracing.trace` has it.
    """
    ends, lost = _checked(outputs, residual_branches(outputs))
    return ends | {name: ends[twin] for name, twin in _twins(block, ends, outputs)}, lost


def residual_branches(outputs: list[Node]) -> list[tuple[Node, Node]]:
    """Stream and branch of every residual sum, from the outputs of a block back to its inputs."""
    found: list[tuple[Node, Node]] = []
    seen: set[Node] = set()
    ways = list(outputs)
    while ways:
        node = ways.pop()
        if node in seen:
            continue
        seen.add(node)
        pair = _residual(node)
        if pair:
            found.append(pair)
            ways.append(pair[0])
        elif node.op in _NORMS or node.op in _FIRST:
            ways += _nodes_of(node.args[:1])
        elif node.op in _JOINED or node.op in _PRODUCTS:
            ways += node.inputs()
        elif node.op in _SUMS:
            ways += _nodes_of(node.args)
    return found


def _residual(node: Node) -> tuple[Node, Node] | None:
    """Stream and branch of a sum x + f(x); also of x + f(x) + g(x), where g(x) does not depend on f(x)."""
    if node.op != "add" or len(terms := _nodes_of(node.args[:2])) < 2:
        return None
    for stream, branch in (terms, terms[::-1]):
        if _stripped(stream) in _behind([branch]):
            return stream, branch
    for stream, branch in (terms, terms[::-1]):
        inner, other = _residual(_stripped(stream)), _residual(_stripped(branch))
        if inner and not other and _stripped(inner[0]) in _behind([branch]):
            return stream, branch
    return None


def _stripped(node: Node) -> Node:
    """What a node is a reshaped, cast, cut-out or dropped-out form of."""
    while node.op in _FIRST and _nodes_of(node.args[:1]):
        node = node.args[0]
    return node


def _checked(outputs: list[Node], residuals: list[tuple[Node, Node]]) -> tuple[Ends, int]:
    """The ends of all branches, without those on which more depends than their branches; and how many have none."""
    of_branch = [(branch, _scaled_by(branch, stream)) for stream, branch in residuals]
    branches = [branch for branch, _ in of_branch]
    cut = {branch for branch, ends in of_branch if ends}
    free = _names(_behind(outputs, cut))
    for branch, ends in of_branch:
        others = [set(other or ()) for node, other in of_branch if node is not branch]
        if ends and any(ends.keys() != other for other in others if ends.keys() & other):
            free |= ends.keys()
    kept = [ends if ends and not ends.keys() & free else None for _, ends in of_branch]
    held = {name: added for ends in kept if ends for name, added in ends.items()}
    for index, (branch, ends) in enumerate(zip(branches, kept, strict=True)):
        if ends and _names(_behind([branch], set(branches) - {branch})) & (held.keys() - ends.keys()):
            kept[index] = None
    return {name: added for ends in kept if ends for name, added in ends.items()}, sum(not ends for ends in kept)


def _scaled_by(node: Node, stream: Node) -> Ends | None:
    """Tensors in which a node is of degree one; none at all for a zero; None if there are none for another node."""
    if node.op == "tensor":
        return {node.name: 0.0}
    if node.op in _ZEROS:
        return {}
    if node.op in _LAYERS:
        parts = [_argument(node, number, name) for number, name in zip(_LAYERS[node.op], _NAMES, strict=False)]
        return _all(parts[:1] + [part for part in parts[1:] if part is not None], stream)
    if node.op in _FIRST:
        return _all(node.args[:1], stream)
    if node.op in _JOINED:
        return _all(_nodes_of(node.args[:1]), stream)
    if node.op in _SUMS:
        terms = [_argument(node, number, _SOURCES[number]) for number in _SUMS[node.op]]
        return _offset(terms, stream) if node.op == "add" else _all(terms, stream)
    if node.op in _PRODUCTS:
        factors = sorted(node.inputs(), key=lambda factor: stream not in _behind([factor]))
        for factor in factors:
            ends = _scaled_by(factor, stream)
            rest = [other for other in factors if other is not factor]
            if ends is not None and not ends.keys() & _names(_behind(rest)) and len(rest) == len(factors) - 1:
                return ends
    return None


_NAMES = ("weight", "bias")
_SOURCES = {0: "input", 1: "other", 2: "value", 3: "source"}


def _argument(node: Node, number: int, name: str) -> object:
    """An argument by its number or its name."""
    return node.args[number] if number < len(node.args) else node.kwargs.get(name, node.kwargs.get("src"))


def _all(terms: Collection[object], stream: Node) -> Ends | None:
    """What scales every term; numbers are scaled by nothing, unless they are zero."""
    ends: Ends = {}
    for term in terms:
        if type(term) is not Node:
            if isinstance(term, int | float) and term == 0:
                continue
            return None
        own = _scaled_by(term, stream)
        if own is None or any(ends.get(name, added) != added for name, added in own.items()):
            return None
        ends |= own
    return ends


def _offset(terms: list, stream: Node) -> Ends | None:
    """What scales a sum; of a tensor and a number, the tensor with the number added."""
    numbers = [term for term in terms if isinstance(term, int | float)]
    if len(numbers) != 1:
        return _all(terms, stream)
    ends = _all([term for term in terms if type(term) is Node], stream)
    return {next(iter(ends)): float(numbers[0])} if ends and list(ends.values()) == [0.0] else None


def _behind(nodes: Collection[Node], cut: Collection[Node] = ()) -> set[Node]:
    """The nodes that some nodes are made of, themselves included, without what lies behind the `cut`."""
    seen: set[Node] = set()
    ways = list(nodes)
    while ways:
        node = ways.pop()
        if node not in seen and node not in cut:
            seen.add(node)
            ways += node.inputs()
    return seen


def _names(nodes: Collection[Node]) -> set[str]:
    return {node.name for node in nodes if node.op == "tensor"}


def _nodes_of(values: object) -> list[Node]:
    return list(Node("", (values,)).inputs())


def _twins(block: nn.Module, ends: Ends, outputs: list[Node]) -> Iterator[tuple[str, str]]:
    """Tensors of experts like one that was followed, each with that one's: which of them runs depends on the data."""
    read = _names(_behind(outputs))
    for name in ends:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            for other, _ in block.named_parameters():
                pattern = re.escape(name[: number.start()]) + r"\d+" + re.escape(name[number.end() :])
                if other not in read and re.fullmatch(pattern, other):
                    yield other, name
