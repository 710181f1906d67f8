# SPDX-License-Identifier: Apache-2.0
"""The gene pool, and one generation of it: pure functions, in the order of the authors' code.

Of every type of gene the pool holds `size` entries: an agent whose layers of that type may be inherited, and a score.

    p(c) = the scores of type c / all scores                                          (`type_probabilities`)
    birth          task ~ uniform, type c ~ p, father ~ the entries of c by score     (`draw_birth`)
    life           R, and s = R / max R of the task x mean R / F(inherited type)      (`relative_scores`)
    tournament     of each three the best survives                                    (`evolution.selection`)
    ageing         every score in the pool x 0.6                                      (`age`)
    credit         each survivor pays its ancestors                                   (`pay`)
    filing         it keeps its type with probability (1 + p) / 2, else type ~ p      (`draw_filing`)
    merge          per type: the 2 worst and the new ones compete for their 2 places  (`merge`)

Guards that the authors' code lacks: a fitness below `LEAST_FITNESS` counts as that, so that no division is by zero and
no weight of a draw negative.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..selection import ancestor_credit, draw
from .genes import GeneType, gene_size, gene_types, overlap


__all__ = [
    "Birth",
    "Entry",
    "Parentage",
    "age",
    "best_entry",
    "draw_birth",
    "draw_filing",
    "first_pool",
    "merge",
    "pay",
    "relative_scores",
    "type_probabilities",
]

LEAST_FITNESS = 1e-3


@dataclass(frozen=True)
class Entry:
    """An agent in the pool.

    Attributes:
        id: of the entry; an agent of the first generation may have several, each with its own score.
        agent: id of the agent.
        gene_type: which of its layers are inherited from here.
    """

    id: int
    agent: int
    gene_type: GeneType
    score: float


@dataclass(frozen=True)
class Birth:
    """What a newborn is given: the index of its task, and the entry whose layers it inherits."""

    task: int
    father: Entry


@dataclass(frozen=True)
class Parentage:
    """Where an agent comes from; the first generation inherited nothing: None.

    Attributes:
        gene_type: that it inherited.
        entry: id of the entry that it inherited from.
        father: id of the agent of that entry.
    """

    gene_type: GeneType | None = None
    entry: int | None = None
    father: int | None = None


def type_probabilities(pool: Sequence[Entry]) -> dict[GeneType, float]:
    """p(c) of all types that there are."""
    scores = dict.fromkeys(gene_types(), 0.0)
    for entry in pool:
        scores[entry.gene_type] += entry.score
    total = sum(scores.values())
    return {gene_type: score / total for gene_type, score in scores.items()}


def relative_scores(fitness: Sequence[float], tasks: Sequence[int], sizes: Sequence[float]) -> list[float]:
    """s of every newborn of a generation, with `sizes` F of what each inherited; 1 in the first generation."""
    guarded = [max(value, LEAST_FITNESS) for value in fitness]
    best: dict[int, float] = {}
    for value, task in zip(guarded, tasks, strict=True):
        best[task] = max(value, best.get(task, 0.0))
    mean = sum(guarded) / len(guarded)
    return [value / best[task] * mean / size for value, task, size in zip(guarded, tasks, sizes, strict=True)]


def first_pool(
    scores: Mapping[int, float], size: int, layer_sizes: Mapping[int, float], generator: torch.Generator
) -> list[Entry]:
    """`size` entries a type, each a random survivor of the first generation with its score / F(type).

    Args:
        scores: of the survivors, by id.
    """
    agents, pool = list(scores), list[Entry]()
    for gene_type in gene_types():
        for _ in range(size):
            agent = agents[draw([1.0] * len(agents), generator)]
            score = scores[agent] / gene_size(gene_type, layer_sizes)
            pool.append(Entry(len(pool), agent, gene_type, score))
    return pool


def draw_birth(pool: Sequence[Entry], tasks: int, generator: torch.Generator) -> Birth:
    """Task, type and father of a newborn."""
    task = draw([1.0] * tasks, generator)
    probabilities = type_probabilities(pool)
    chosen = list(probabilities)[draw(list(probabilities.values()), generator)]
    fathers = [entry for entry in pool if entry.gene_type == chosen]
    return Birth(task, fathers[draw([entry.score for entry in fathers], generator)])


def age(pool: Sequence[Entry], alpha: float = 0.6) -> list[Entry]:
    """The pool one generation later."""
    return [replace(entry, score=alpha * entry.score) for entry in pool]


def pay(
    pool: Sequence[Entry],
    survivors: Mapping[int, float],
    parents: Mapping[int, Parentage],
    layer_sizes: Mapping[int, float],
) -> list[Entry]:
    """The pool after the survivors have paid their ancestors, as far as these are still in it.

    Args:
        survivors: their scores, by id.
        parents: of every agent that ever lived.
    """
    gains: dict[int, float] = {}
    for agent, score in survivors.items():
        entries, overlaps, node = [], [], parents[agent]
        while node.entry is not None and node.father is not None:
            entries.append(node.entry)
            father = parents[node.father]
            overlaps.append(overlap(node.gene_type, father.gene_type, layer_sizes))
            node = father
        for entry, gain in zip(entries, ancestor_credit(score, overlaps), strict=False):  # the last overlap is unused
            gains[entry] = gains.get(entry, 0.0) + gain
    return [replace(entry, score=entry.score + gains.get(entry.id, 0.0)) for entry in pool]


def draw_filing(inherited: GeneType, probabilities: Mapping[GeneType, float], generator: torch.Generator) -> GeneType:
    """The type under which a survivor is filed: weights p, and 1 more for the type that it inherited."""
    weights = [probability + (gene_type == inherited) for gene_type, probability in probabilities.items()]
    return list(probabilities)[draw(weights, generator)]


def merge(pool: Sequence[Entry], candidates: Sequence[Entry], obsolete: int = 2) -> list[Entry]:
    """The pool after, in every type that has candidates, these compete with the `obsolete` worst for their places.

    Of equal scores the one that was there first stays.
    """
    merged = []
    for gene_type in gene_types():
        old = sorted((entry for entry in pool if entry.gene_type == gene_type), key=lambda entry: -entry.score)
        new = [entry for entry in candidates if entry.gene_type == gene_type]
        keep = len(old) - min(obsolete, len(old)) if new else len(old)
        contest = sorted(old[keep:] + new, key=lambda entry: -entry.score)
        merged += old[:keep] + contest[: len(old) - keep]
    return merged


def best_entry(pool: Sequence[Entry]) -> Entry:
    """The answer of an evolution: of the most probable type, the entry with the highest score."""
    probabilities = type_probabilities(pool)
    chosen = max(probabilities, key=lambda gene_type: probabilities[gene_type])
    return max((entry for entry in pool if entry.gene_type == chosen), key=lambda entry: entry.score)
