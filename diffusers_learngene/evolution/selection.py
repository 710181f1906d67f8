# SPDX-License-Identifier: Apache-2.0
"""Who passes on its learngene, and whose ancestors are thanked for it: pure functions.

Of every group of newborns the fittest wins (`tournament`). The pool ages: with every generation each stored score is
multiplied by alpha. A winner with score s then pays credit up its tree (GRL's rule, which GTL borrows):

    parent  beta s,    grandparent  beta^2 s w_1,    great-grandparent  beta^4 s w_2,   ...      beta = 1/e

where w_j is the overlap of what the j-th ancestor inherited with what its own child inherited from it. The exponents
double and the overlap is replaced, not multiplied, as in the authors' code.
"""

import math
from collections.abc import Sequence

import torch


__all__ = ["ancestor_credit", "draw", "tournament"]


def tournament(fitness: Sequence[float], size: int, order: Sequence[int] | None = None) -> list[int]:
    """The indices of the winners: of each group of `size`, the one with the greatest fitness; of equals, the first.

    Args:
        fitness: of every newborn; not NaN.
        order: the newborns as they are grouped, one group after the other; default: as they are numbered. The last
            group may be smaller.

    Raises:
        ValueError: size < 1, a fitness that is NaN, or an order that is not a permutation.
    """
    if size < 1:
        raise ValueError(f"size={size} of a tournament must be at least 1.")
    if any(math.isnan(value) for value in fitness):
        raise ValueError(f"fitness={list(fitness)} holds NaN: nobody can win against it.")
    order = list(range(len(fitness))) if order is None else list(order)
    if sorted(order) != list(range(len(fitness))):
        raise ValueError(f"order={order} is not a permutation of {len(fitness)} newborns.")
    groups = (order[start : start + size] for start in range(0, len(order), size))
    return [max(group, key=lambda index: fitness[index]) for group in groups]


def ancestor_credit(score: float, overlaps: Sequence[float], beta: float = 1 / math.e) -> list[float]:
    """What parent, grandparent, ... of a winner gain.

    Args:
        score: of the winner.
        overlaps: from 0 to 1, by step of the way up: of what the winner and the parent inherited, of what the parent
            and the grandparent inherited, ...; the first weighs the grandparent, so one fewer than there are ancestors
            is used.
        beta: 1/e in the paper.

    Returns:
        One number an ancestor, `len(overlaps) + 1` of them.
    """
    return [score * weight * beta ** (2**step) for step, weight in enumerate([1.0, *overlaps])]


def draw(weights: Sequence[float], generator: torch.Generator) -> int:
    """An index with probability in proportion to its weight; of weights that are all zero, any.

    Raises:
        ValueError: no weights, or one that is negative or not finite.
    """
    values = torch.tensor(list(weights), dtype=torch.float64)
    if not len(values) or not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"weights={list(weights)} must be finite numbers from 0, at least one of them.")
    if values.max() == 0:
        values = torch.ones_like(values)
    return int(torch.multinomial(values / values.max(), 1, generator=generator))
