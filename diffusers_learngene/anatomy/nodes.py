# SPDX-License-Identifier: Apache-2.0
"""What a forward computes, as a graph of steps, found without numbers (`tracing`) or in a real call (`recorded`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


def words(text: str) -> frozenset[str]:
    """The words of a text, such as names of torch functions."""
    return frozenset(text.split())


@dataclass(frozen=True, eq=False)
class Node:
    """One step: the torch function of that name and its arguments; or a leaf.

    Leaves are "tensor", a parameter or buffer of the block with its `name` in it; "input"; and "constant".
    """

    op: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def inputs(self) -> Iterator["Node"]:
        return nodes_in((self.args, self.kwargs))


@dataclass(frozen=True)
class Trace:
    """What a block's forward returns, and which of its modules hold a tensor that is read by another module."""

    outputs: list[Node]
    read_outside: frozenset[str]


class TracingError(Exception):
    """A forward that cannot be followed."""


def flat(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from flat(part)


def nodes_in(value: Any) -> Iterator[Node]:
    return (part for part in flat(value) if type(part) is Node)
