# SPDX-License-Identifier: Apache-2.0
"""The pool of circuits that newborns inherit from, from one generation to the next: pure functions.

    score        a newborn's accuracy above chance, at most 1                         (`score_of`)
    birth        parent ~ the pool by score                                           (`draw_parent`)
    tournament   of each group of newborns, in a random order, the best comes in,     (`evolution.selection`)
                 with a score of 0 if it is no better than chance
    ageing       the scores in the pool x alpha
    credit       each winner pays its ancestors that are in the pool                  (`evolution.selection`)
    merge        the best of all stay                                                 (`next_pool`)

The rule of credit is GRL's: w_1, by which the grandparent's part is weighed, compares what the winner inherited with
what its parent had inherited. Between the two is the parent's mutation: w_j is how much of the circuit the mutation of
the j-th ancestor left. The winner's own says nothing about its ancestors, and of the first there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lineage import Lineage
from ..selection import ancestor_credit, draw, tournament
from .options import EvolutionOptions


__all__ = ["Entry", "diversity", "draw_parent", "next_pool", "score_of"]


@dataclass(frozen=True)
class Entry:
    """A circuit: id of the individual that it was extracted from, score, and tensors on the CPU."""

    id: int
    score: float
    tensors: dict[str, Tensor]


def score_of(fitness: float, num_ways: int) -> float:
    """Accuracy among `num_ways` classes, above chance: 0 for guesses, below 0 for worse, 1 for no error."""
    chance = 1 / num_ways
    return (fitness - chance) / (1 - chance)


def draw_parent(pool: Sequence[Entry], generator: torch.Generator) -> Entry | None:
    """Whose circuit a newborn inherits; None as long as the pool is empty."""
    return pool[draw([entry.score for entry in pool], generator)] if pool else None


def next_pool(
    pool: Sequence[Entry],
    newborns: Sequence[Entry],
    lineage: Lineage,
    options: EvolutionOptions,
    generator: torch.Generator,
) -> list[Entry]:
    """The pool after a generation, best first; with `selection="random"` all scores are 1.

    Args:
        newborns: with their scores, in the order of their birth.
        lineage: of the newborns and everyone before; "overlap" among the facts of each is that of the circuit that
            it passes on with the one that it inherited.
        generator: draws who meets whom in the tournament.
    """
    if options.selection == "random":
        newborns = [replace(entry, score=1.0) for entry in newborns]
    order = torch.randperm(len(newborns), generator=generator).tolist()
    fittest = [newborns[i] for i in tournament([entry.score for entry in newborns], options.tournament_size, order)]
    winners = [replace(entry, score=max(0.0, entry.score)) for entry in fittest]  # no draw has negative weights
    credit: dict[int, float] = {}
    for winner in winners:
        ancestors = lineage.ancestors(winner.id)
        overlaps = [lineage[id].facts["overlap"] for id in ancestors[:-1]]
        gains = ancestor_credit(winner.score, overlaps, options.beta)
        for id, gain in zip(ancestors, gains, strict=False):  # who has no ancestors pays none
            credit[id] = credit.get(id, 0.0) + gain
    aged = [replace(entry, score=options.alpha * entry.score + credit.get(entry.id, 0.0)) for entry in pool]
    if options.selection == "random":
        aged = [replace(entry, score=1.0) for entry in aged]
    return sorted([*winners, *aged], key=lambda entry: -entry.score)[: options.pool_size]


def diversity(circuits: Sequence[dict[str, Tensor]]) -> float:
    """1 minus the mean cosine of the weights of two circuits: 0 if all are the same, about 1 if none are related."""
    if len(circuits) < 2:
        return 0.0
    names = [name for name, tensor in circuits[0].items() if tensor.ndim == 4]
    flat = torch.stack([torch.cat([circuit[name].flatten() for name in names]) for circuit in circuits])
    cosines = torch.nn.functional.normalize(flat, dim=1)
    count = len(circuits)
    similar = (cosines.sum(0).square().sum() - count).item() / (count * (count - 1))
    return 1 - similar
