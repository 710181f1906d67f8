# SPDX-License-Identifier: Apache-2.0
"""What the best gene is worth: newborns that start with it, beside newborns that start otherwise.

    gene             the two layers that won
    scratch          nothing
    full transfer    the whole actor of the same father
    other layers     two other layers of the same father, drawn anew for every newborn

The same tasks, seeds and fresh layers for all. The return of the first epoch, before anything is learnt, is what the
paper calls instinct; the mean over a life is the area under the learning curve; the deviation over newborns says how
stable learning is.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from ...runs.sampler import derived_seed, seeded_generator
from ..selection import draw
from .evolution import EvolutionConfig, Population, mean_return
from .genes import gene_types, tensors_of
from .life import Life
from .network import Actor
from .workers import Job, Workers


__all__ = ["STARTS", "curves_of", "examine", "summarise"]

STARTS = ("gene", "scratch", "full transfer", "other layers")
_EXAMINATION = 9  # what random numbers are for; `evolution` has 0 to 3
Results = dict[str, dict[str, list[Life]]]


def examine(
    population: Population, config: EvolutionConfig, tasks: Sequence[str], newborns: int, workers: Workers
) -> Results:
    """By start and task, the lives of `newborns` newborns; the same on every process."""
    entry = population.winner()
    heir = population.heirs[entry.agent]
    types = gene_types()
    others = [0.0 if gene_type == entry.gene_type else 1.0 for gene_type in types]

    def inherited(start: str, place: int, index: int) -> Actor | None:
        if start == "scratch":
            return None
        if start == "full transfer":
            return heir.actor
        if start == "gene":
            return tensors_of(heir.actor, entry.gene_type)
        chance = seeded_generator(config.seed, _EXAMINATION, place, index)
        return tensors_of(heir.actor, types[draw(others, chance)])

    places = [(start, place, index) for start in STARTS for place in range(len(tasks)) for index in range(newborns)]
    jobs = [
        Job(
            config.life,
            tasks[place],
            derived_seed(config.seed, _EXAMINATION, place, index),
            inherited(start, place, index),
            heir.statistics if config.life.inherit_statistics and start != "scratch" else None,
        )
        for start, place, index in places
    ]
    results: Results = {start: {task: [] for task in tasks} for start in STARTS}
    for (start, place, _), life in zip(places, workers.run(jobs, "newborns"), strict=True):
        results[start][tasks[place]].append(life)
    return results


def summarise(results: Results, unseen: Sequence[str]) -> list[dict[str, Any]]:
    """A row a start: of returns, the mean in the first epoch (instinct), in the last, over the life (area), its
    standard deviation over the newborns of a task, and the area on unseen tasks."""
    rows = []
    for start, by_task in results.items():
        seen = [lives for task, lives in by_task.items() if task not in unseen]
        rows.append(
            {
                "start": start,
                "first epoch": mean_return([life.scores[0] for lives in seen for life in lives]),
                "last epoch": mean_return([life.scores[-1] for lives in seen for life in lives]),
                "area": mean_return([mean_return(life.scores) for lives in seen for life in lives]),
                "std of area": mean_return(
                    [_deviation([mean_return(life.scores) for life in lives]) for lives in seen]
                ),
                "area, unseen": mean_return([mean_return(life.scores) for task in unseen for life in by_task[task]]),
            }
        )
    return rows


def curves_of(results: Results) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By task and start, the mean return of every epoch."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for start, by_task in results.items():
        for task, lives in by_task.items():
            means = [mean_return(scores) for scores in zip(*(life.scores for life in lives), strict=True)]
            points = [(epoch, mean) for epoch, mean in enumerate(means, 1) if mean is not None]
            curves.setdefault(task, {})[start] = points
    return curves


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
