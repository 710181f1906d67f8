# SPDX-License-Identifier: Apache-2.0
"""The residual sums of a block, x + f(x), in what its forward computes (`tracing`, `recorded`).

Going back from the outputs, every sum of which one term is made of the other is one; the way goes on along the stream.
"""

from collections.abc import Collection
from dataclasses import dataclass

from .nodes import Node, words


# By the number of the argument in which a torch function is linear, or of those whose sum it is linear in.
FIRST = words(
    "bfloat16 broadcast_to chunk clone contiguous cpu cuda data detach div dropout dropout1d dropout2d dropout3d "
    "expand expand_as feature_dropout flatten flip float gather getitem half index_select mT mean movedim moveaxis "
    "nan_to_num narrow neg pad permute real repeat repeat_interleave reshape reshape_as roll select split "
    "split_with_sizes squeeze sum swapaxes swapdims t T tensor_split tile to transpose true_divide truediv type "
    "type_as unbind unflatten unsqueeze view view_as"
)
JOINED = words("cat concat concatenate hstack stack vstack")
SUMS = {
    **dict.fromkeys(("add", "sub"), (0, 1)),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter_reduce", "scatter"), (0, 3)),
    **dict.fromkeys(("index_put", "setitem", "masked_scatter"), (0, 2)),
    "where": (1, 2),
}
PRODUCTS = words("bmm einsum mm mul multiply matmul _grouped_mm grouped_mm")
NORMS = words("layer_norm rms_norm group_norm batch_norm instance_norm")


@dataclass(frozen=True)
class ResidualSum:
    """A residual sum: the stream, the branch, and whether what comes of the sum is normalised at once."""

    stream: Node
    branch: Node
    normed: bool


def residual_sums(outputs: list[Node]) -> tuple[list[ResidualSum], int]:
    """Every residual sum, from the outputs of a block back to its inputs; and how many inputs beside the stream are
    added to it as they come, which nothing in the block scales."""
    found: list[ResidualSum] = []
    foreign = 0
    seen: set[Node] = set()
    ways = [(node, False) for node in outputs]
    while ways:
        node, normed = ways.pop()
        if node in seen:
            continue
        seen.add(node)
        pair = residual_terms(node)
        if pair:
            found.append(ResidualSum(*pair, normed))
            ways.append((pair[0], False))
        elif node.op in NORMS:
            ways += [(before, True) for before in nodes_of(node.args[:1])]
        elif node.op in FIRST:
            ways += [(before, normed) for before in nodes_of(node.args[:1])]
        elif node.op in JOINED or node.op in PRODUCTS:
            ways += [(before, normed) for before in node.inputs()]
        elif node.op in SUMS:
            terms = nodes_of(node.args)
            foreign += node.op == "add" and len(terms) > 1 and all(stripped(term).op == "input" for term in terms)
            ways += [(before, normed) for before in terms]
    return found, foreign


def residual_terms(node: Node) -> tuple[Node, Node] | None:
    """Stream and branch of a sum x + f(x); also of x + f(x) + g(x), where g(x) does not depend on f(x)."""
    if node.op != "add" or len(terms := nodes_of(node.args[:2])) < 2:
        return None
    for stream, branch in (terms, terms[::-1]):
        if _sources(stream) <= behind([branch]):
            return stream, branch
    for stream, branch in (terms, terms[::-1]):
        inner, other = residual_terms(stripped(stream)), residual_terms(stripped(branch))
        if inner and not other and _sources(inner[0]) <= behind([branch]):
            return stream, branch
    return None


def _sources(node: Node) -> set[Node]:
    """What a node is a reshaped form of; of parts that are joined, what each of them is."""
    node = stripped(node)
    if node.op in JOINED and (parts := nodes_of(node.args[:1])):
        return set().union(*map(_sources, parts))
    return {node}


def stripped(node: Node) -> Node:
    """What a node is a reshaped, cast, cut-out or dropped-out form of, or that times a number (MiniMax's stream)."""
    while True:
        if node.op in FIRST and nodes_of(node.args[:1]):
            node = node.args[0]
        elif node.op in ("mul", "multiply") and len(factors := nodes_of(node.args)) == 1:
            (node,) = factors
        else:
            return node


def behind(nodes: Collection[Node], cut: Collection[Node] = ()) -> set[Node]:
    """The nodes that some nodes are made of, themselves included, without what lies behind the `cut`."""
    seen: set[Node] = set()
    ways = list(nodes)
    while ways:
        node = ways.pop()
        if node not in seen and node not in cut:
            seen.add(node)
            ways += node.inputs()
    return seen


def nodes_of(values: object) -> list[Node]:
    return list(Node("", (values,)).inputs())
