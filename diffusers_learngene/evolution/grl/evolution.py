# SPDX-License-Identifier: Apache-2.0
"""An evolution: generations of newborns that inherit a gene, live, and leave one.

What is passed on is what a father was when he died (`heritage="trained"`, Lamarck), or when he was born ("birth",
Darwin), or nothing, so that a newborn is as fresh as the first ones ("random"); so are the statistics of observations,
if they are inherited. Tournaments, pool and draws are the same in all three. An evolution is a pure function of its
config: it may stop after any generation and go on from its snapshot.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...runs.sampler import derived_seed, seeded_generator
from ...runs.snapshots import load_snapshot, save_snapshot
from ..lineage import Individual, Lineage
from ..selection import tournament
from .genes import GeneType, gene_size, layer_sizes, tensors_of
from .life import Life, LifeConfig, Statistics, fitness_of
from .network import Actor
from .pool import (
    Birth,
    Entry,
    Parentage,
    age,
    best_entry,
    draw_birth,
    draw_filing,
    first_pool,
    merge,
    pay,
    relative_scores,
    type_probabilities,
)
from .workers import Job, Workers


__all__ = ["EvolutionConfig", "Heir", "Population", "evolve", "next_generation"]

Heritage = Literal["trained", "birth", "random"]
_BIRTH, _LIFE, _POOL, _FILING = range(4)  # what random numbers are for


@dataclass(frozen=True)
class EvolutionConfig:
    """The defaults are the paper's.

    Attributes:
        population_size: newborns a generation.
        num_generations: after the first, of random agents.
        pool_size: entries for each type of gene.
        obsolete: of them, how many have to defend their places in a generation.
    """

    life: LifeConfig = LifeConfig()
    tasks: tuple[str, ...] = ("step", "curve", "bumpy", "rubble")
    population_size: int = 50
    num_generations: int = 100
    pool_size: int = 7
    tournament_size: int = 3
    alpha: float = 0.6
    obsolete: int = 2
    heritage: Heritage = "trained"
    seed: int = 0


@dataclass(frozen=True)
class Heir:
    """What is kept of an agent that is in the pool: the actor that it passes on, and its observations' statistics."""

    actor: Actor
    statistics: Statistics


@dataclass
class Population:
    """An evolution between two generations.

    Attributes:
        heirs: agents in the pool, by id.
        parents: of every agent that ever lived, by id.
        history: by generation: probabilities of the types of genes, steps/s, ...
    """

    generation: int = 0
    pool: list[Entry] = field(default_factory=list)
    heirs: dict[int, Heir] = field(default_factory=dict)
    parents: dict[int, Parentage] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    history: list[dict[str, Any]] = field(default_factory=list)

    def winner(self) -> Entry:
        return best_entry(self.pool)


def evolve(
    config: EvolutionConfig,
    workers: Workers,
    output_dir: str | os.PathLike[str],
    *,
    resume: Path | None = None,
    checkpoints_total_limit: int | None = 1,
    log: Callable[[int, dict[str, Any]], None] | None = None,
) -> Population:
    """Run an evolution to its end; the same on every process.

    Args:
        output_dir: of the snapshots, one after every generation.
        resume: a snapshot to go on from.
        log: called on every process with (generation, numbers).

    Raises:
        ValueError: fewer agents than one tournament, or a snapshot that is damaged or of another evolution.
    """
    if config.population_size < config.tournament_size:
        raise ValueError(
            f"population_size={config.population_size} is too small for a tournament of {config.tournament_size}."
        )
    population = load(resume, config) if resume else Population()
    while population.generation <= config.num_generations:
        population = next_generation(population, config, workers)
        if log is not None:
            log(population.generation - 1, population.history[-1])
        if workers.accelerator.is_main_process:
            save(population, config, output_dir, checkpoints_total_limit)
        workers.accelerator.wait_for_everyone()
    return population


def next_generation(population: Population, config: EvolutionConfig, workers: Workers) -> Population:
    """The population after one more generation: birth, life, tournament, ageing, credit, filing, merge."""
    generation, first = population.generation, population.generation * config.population_size
    ids = range(first, first + config.population_size)
    tasks, births = _births(population, config)
    jobs = [_job(population, config, id, task, birth) for id, task, birth in zip(ids, tasks, births, strict=True)]
    lives = workers.run(jobs, f"{config.heritage} layers, generation {generation} of {config.num_generations}")
    if unknown := sum(all(score is None for score in life.scores) for life in lives):
        warnings.warn(
            f"{unknown} of {len(lives)} lives of generation {generation} ended no episode, so their fitness is 0: "
            f"make lives longer (epochs={config.life.epochs}, steps={config.life.steps}), or episodes shorter "
            f"(max_episode_steps={config.life.max_episode_steps}).",
            stacklevel=2,
        )

    sizes = layer_sizes({name: tensor.shape for name, tensor in lives[0].actor.items()})
    fitness = [fitness_of(life.scores, config.life.offset) for life in lives]
    inherited = [1.0 if birth is None else gene_size(birth.father.gene_type, sizes) for birth in births]
    scores = relative_scores(fitness, tasks, inherited)
    survivors = {ids[index]: scores[index] for index in tournament(scores, config.tournament_size)}
    parents = population.parents | {id: _parentage(birth) for id, birth in zip(ids, births, strict=True)}
    if generation == 0:
        pool = first_pool(survivors, config.pool_size, sizes, seeded_generator(config.seed, 0, _POOL))
    else:
        probabilities = type_probabilities(population.pool)
        pool = pay(age(population.pool, config.alpha), survivors, parents, sizes)
        candidates = []
        for id, score in survivors.items():
            old = parents[id].gene_type
            assert old is not None
            new = draw_filing(old, probabilities, seeded_generator(config.seed, generation, _FILING, id))
            # An agent that survives its own generation has one entry; ids of the first pool are smaller.
            entry_id = len(population.pool) + id
            candidates.append(Entry(entry_id, id, new, score * gene_size(old, sizes) / gene_size(new, sizes)))
        pool = merge(pool, candidates, config.obsolete)

    heirs = population.heirs | {id: _heir(life, config.heritage) for id, life in zip(ids, lives, strict=True)}
    kept = {entry.agent for entry in pool}
    lineage = Lineage(list(population.lineage))
    for id, task, life, value in zip(ids, tasks, lives, fitness, strict=True):
        parent = parents[id]
        lineage.add(Individual(id, generation, parent.father))
        facts = {"task": config.tasks[task], "gene": list(parent.gene_type or ()), "scores": life.scores}
        lineage.record(id, fitness=value, **facts)
    return Population(
        generation + 1,
        pool,
        {id: heir for id, heir in heirs.items() if id in kept},
        parents,
        lineage,
        [*population.history, _record(pool, lives, fitness, workers.steps_per_second)],
    )


def _births(population: Population, config: EvolutionConfig) -> tuple[list[int], list[Birth | None]]:
    generation, count = population.generation, len(config.tasks)
    draws = [seeded_generator(config.seed, generation, _BIRTH, index) for index in range(config.population_size)]
    if generation == 0:
        return [int(torch.randint(count, (), generator=draw)) for draw in draws], [None] * config.population_size
    births = [draw_birth(population.pool, count, draw) for draw in draws]
    return [birth.task for birth in births], list(births)


def _job(population: Population, config: EvolutionConfig, id: int, task: int, birth: Birth | None) -> Job:
    inherited, statistics = None, None
    if birth is not None and config.heritage != "random":
        heir = population.heirs[birth.father.agent]
        inherited = tensors_of(heir.actor, birth.father.gene_type)
        statistics = heir.statistics if config.life.inherit_statistics else None
    return Job(config.life, config.tasks[task], derived_seed(config.seed, _LIFE, id), inherited, statistics)


def _parentage(birth: Birth | None) -> Parentage:
    return Parentage() if birth is None else Parentage(birth.father.gene_type, birth.father.id, birth.father.agent)


def _heir(life: Life, heritage: Heritage) -> Heir:
    return Heir(life.birth, life.birth_statistics) if heritage == "birth" else Heir(life.actor, life.statistics)


def _record(pool: Sequence[Entry], lives: Sequence[Life], fitness: Sequence[float], speed: float) -> dict[str, Any]:
    return {
        "fitness": sum(fitness) / len(fitness),
        "return": mean_return([score for life in lives for score in life.scores]),
        "instinct": mean_return([life.scores[0] for life in lives]),
        "steps per second": speed,
        "probabilities": {name_of(gene_type): value for gene_type, value in type_probabilities(pool).items()},
    }


def mean_return(scores: Sequence[float | None]) -> float | None:
    """Of the epochs in which an episode ended; None if there are none."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def name_of(gene_type: GeneType) -> str:
    """The type as it is written in tables: 0+5."""
    return "+".join(str(layer) for layer in gene_type)


def save(
    population: Population, config: EvolutionConfig, output_dir: str | os.PathLike[str], total_limit: int | None
) -> None:
    """Write a snapshot."""
    tensors: dict[str, Tensor] = {}
    for id, heir in population.heirs.items():
        arrays = heir.actor | {"mean": heir.statistics.mean, "variance": heir.statistics.variance}
        # Copies: father and son may share their statistics, and safetensors saves no tensor twice.
        tensors |= {f"{id}/{name}": torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    state = {
        "signature": signature(config),
        "generation": population.generation,
        "pool": [asdict(entry) for entry in population.pool],
        "counts": {id: heir.statistics.count for id, heir in population.heirs.items()},
        "parents": {id: asdict(parentage) for id, parentage in population.parents.items()},
        "lineage": population.lineage.as_json(),
        "history": population.history,
    }
    save_snapshot(output_dir, population.generation, tensors, state, total_limit=total_limit)


def load(path: Path, config: EvolutionConfig) -> Population:
    """The population of a snapshot.

    Raises:
        ValueError: it is damaged, or of an evolution with other settings.
    """
    tensors, state = load_snapshot(path, signature(config))
    arrays: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        id, _, part = name.partition("/")
        arrays.setdefault(id, {})[part] = tensor.numpy()
    heirs = {}
    for id, actor in arrays.items():
        statistics = Statistics(actor.pop("mean"), actor.pop("variance"), state["counts"][id])
        heirs[int(id)] = Heir(actor, statistics)
    return Population(
        state["generation"],
        [Entry(**{**entry, "gene_type": tuple(entry["gene_type"])}) for entry in state["pool"]],
        heirs,
        {int(id): _parentage_of(values) for id, values in state["parents"].items()},
        Lineage.from_json(state["lineage"]),
        state["history"],
    )


def _parentage_of(values: dict[str, Any]) -> Parentage:
    gene_type = values["gene_type"]
    return Parentage(**{**values, "gene_type": None if gene_type is None else tuple(gene_type)})


def signature(config: EvolutionConfig) -> dict[str, Any]:
    """What has to be the same for an evolution to go on as it would have; it may become longer."""
    values = asdict(config)
    del values["num_generations"]
    return json.loads(json.dumps(values))
