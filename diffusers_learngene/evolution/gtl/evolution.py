# SPDX-License-Identifier: Apache-2.0
"""Genetic Transfer Learning: generations of networks that inherit a circuit, learn, and pass it on.

    pool <- circuits of random channels of networks trained from scratch, those that win their tournaments
    in every generation, for each newborn:
        birth       a circuit of the pool, drawn by score, in a network that is random otherwise
        life        train the network on a random k-way task of base classes
        extraction  read the circuit from the same channels, with what it has learned (Lamarck), and mutate it
        critic      a new random network inherits it and trains briefly on few images of critic classes, which no life
                    has seen: its validation accuracy is the fitness
    tournament; the pool ages (scores x alpha), winners come in, their ancestors get credit, the best M stay

What a generation learns is thus passed on only as far as it helps to learn something else. The abstracts say:
populations, tournaments, mutation, k-way tasks as environment, critics on held-out classes. The rest is our reading:

- A winner's score is its accuracy above chance, from 0 to 1. Credit to ancestors follows GRL (`selection`); w_j is how
  much of the circuit the mutation of the j-th ancestor left (`circuit.overlap`).
- In a life the zeros stay zeros: the circuit learns without the other channels, which are not passed on with it. Where
  they do not, it comes to lean on them, and the next generation inherits half of a computation.
  Critics and descendants train every weight.
- alpha is 0.3, not GRL's 0.6, with which a circuit of generation 0 still won after fifteen: its credit outweighed any
  newborn's score.
- All critics of a generation learn the same tasks, and so do a few networks without a circuit: `history` has both.
- The answer is the circuit with the highest score in the last pool.

Every draw comes from a generator seeded with (seed, generation, newborn, what for), so that a snapshot needs no random
states, and neither resuming nor the number of processes or threads changes anything. A process has one thread on the
CPU (`threads`): several processes are how several cores are used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ...runs.checkpoints import resolve_checkpoint
from ...runs.sampler import derived_seed, seeded_generator
from ...runs.snapshots import load_snapshot, save_snapshot
from ...runs.threads import one_torch_thread
from ..lineage import Individual, Lineage
from .circuit import extract, first_sets, mutate, overlap, random_sets, set_sizes
from .networks import NetworkConfig, create_network, layout_of, widths_of
from .options import EvolutionOptions
from .pool import Entry, diversity, draw_parent, next_pool, score_of
from .population import Population, accuracy, grow, live
from .tasks import ClassImages, Task, draw_task


__all__ = ["Evolution"]

_BIRTH, _NETWORK, _TASK, _LIFE, _MUTATION, _CRITIC, _CRITIC_TASK, _CRITIC_LIFE, _SELECTION = range(9)


class Evolution:
    """A population, its pool and its past; `run` lets it evolve.

    Args:
        network: the shape of all networks.
        classes: "base" and "critic" classes, as `tasks.split_three` gives them.

    Raises:
        ValueError: too few classes or images, or a population that cannot be shared among the processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: ClassImages,
        classes: dict[str, list[int]],
        network: NetworkConfig,
        options: EvolutionOptions,
    ) -> None:
        self.accelerator, self.images, self.classes = accelerator, images, classes
        self.network, self.options = network, options
        self.layout = layout_of(network)
        self.widths = widths_of(create_network(network, 2, seed=0).state_dict(), self.layout)
        self.sizes = set_sizes(self.widths, options.budget)
        shared = accelerator.num_processes * options.networks_per_batch
        if options.population_size % shared:
            raise ValueError(
                f"population_size={options.population_size} must be a multiple of {accelerator.num_processes} "
                f"processes x networks_per_batch={options.networks_per_batch}."
            )
        self.pool: list[Entry] = []
        self.lineage = Lineage()
        self.history: list[dict[str, float]] = []
        for generation in (0, 1):  # what cannot be drawn shows now
            self._life_task(generation, 0)
            self._critic_tasks(generation)

    @property
    def generation(self) -> int:
        """How many generations have lived."""
        return len(self.history)

    @property
    def winner(self) -> Entry:
        """The circuit with the highest score; of equals, the one that came first."""
        return max(self.pool, key=lambda entry: entry.score)

    def run(self, output_dir: str, *, resume_from_checkpoint: str | None = None, total_limit: int | None = 1) -> None:
        """Evolve to the end, with a snapshot after every generation.

        Args:
            resume_from_checkpoint: see `training.checkpoints.resolve_checkpoint`.

        Raises:
            ValueError: a snapshot that is damaged, of other settings, or in the way.
        """
        path = resolve_checkpoint(output_dir, resume_from_checkpoint)
        if path is not None:
            self.load_state(*load_snapshot(path, self.signature()))
        self.accelerator.wait_for_everyone()
        total = 1 + self.options.num_generations
        with tqdm(
            total=total, initial=self.generation, desc="generations", disable=not self.accelerator.is_main_process
        ) as bar:
            while self.generation < total:
                self.live_generation()
                last = self.history[-1]
                bar.update()
                bar.set_postfix({name: f"{last[name]:.3f}" for name in ("mean", "best", "without", "diversity")})
                self.accelerator.log({f"evolution/{name}": value for name, value in last.items()}, self.generation - 1)
                if self.accelerator.is_main_process:
                    save_snapshot(output_dir, self.generation, *self.state(), total_limit=total_limit)
                self.accelerator.wait_for_everyone()

    @one_torch_thread()
    def live_generation(self) -> None:
        """One generation, from birth to the next pool."""
        options, generation = self.options, self.generation
        parents = [draw_parent(self.pool, self._draws(index, _BIRTH)) for index in range(options.population_size)]
        born = [generation * options.population_size + index for index in range(options.population_size)]

        # Lives, extraction and critics, each process with its share of the newborns.
        circuits, facts, fitness = [], [], []
        critic_tasks = self._critic_tasks(generation)
        for batch in self._batches():
            lived, notes = self._live(batch, [parents[index] for index in batch])
            circuits += lived
            facts += notes
            fitness += self._criticise(batch, lived, critic_tasks)
        circuits, facts, fitness = self._gather(circuits), gather_object(facts), gather_object(fitness)
        others = range(options.population_size, options.population_size + options.networks_per_batch)
        without = self._criticise(list(others), [None] * len(others), critic_tasks)

        for id, parent, notes, value in zip(born, parents, facts, fitness, strict=True):
            self.lineage.add(Individual(id, generation, None if parent is None else parent.id, value, notes))
        scores = [score_of(value, options.num_ways) for value in fitness]
        newborns = [Entry(*one) for one in zip(born, scores, circuits, strict=True)]
        self.pool = next_pool(self.pool, newborns, self.lineage, options, self._draws(0, _SELECTION))
        self.history.append(
            {
                "generation": generation,
                "mean": sum(fitness) / len(fitness),
                "best": max(fitness),
                "without": sum(without) / len(without),
                "diversity": diversity(circuits),
                "parents": len({parent.id for parent in parents if parent is not None}),
                "pool": sum(entry.score for entry in self.pool) / len(self.pool),
            }
        )

    def _live(
        self, batch: Sequence[int], parents: Sequence[Entry | None]
    ) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
        """Births, lives, and extraction with mutation, of newborns that live as one batch."""
        options, generation = self.options, self.generation
        seeds = [self._seed(index, _NETWORK) for index in batch]
        population = self._grow([None if parent is None else parent.tensors for parent in parents], seeds)
        tasks = [self._life_task(generation, index) for index in batch]
        draws = [self._draws(index, _LIFE) for index in batch]
        live(population, self.images, tasks, options.life, draws, keep_zeros=True)

        circuits, facts = [], []
        for place, (index, parent) in enumerate(zip(batch, parents, strict=True)):
            chance = self._draws(index, _MUTATION)
            if parent is None:
                sets, swapped, kept = random_sets(self.widths, self.sizes, chance), 0, 1.0
            else:
                inherited = first_sets(self.sizes)
                sets, swapped = mutate(
                    inherited,
                    self.widths,
                    chance,
                    probability=options.mutation_probability,
                    rate=options.mutation_rate,
                )
                kept = overlap(sets, inherited)
            circuit = extract(population.state_of(place), self.layout, sets)
            circuits.append({name: tensor.detach().cpu().clone() for name, tensor in circuit.items()})
            facts.append({"classes": tasks[place].classes, "swapped": swapped, "overlap": kept})
        return circuits, facts

    def _criticise(
        self, batch: Sequence[int], circuits: Sequence[dict[str, Tensor] | None], tasks: Sequence[Task]
    ) -> list[float]:
        """The fitness of circuits: mean accuracy of critics that inherit them, after a brief training on the tasks."""
        options = self.options
        found = []
        for place, task in enumerate(tasks):
            seeds = [self._seed(index, _CRITIC, place) for index in batch]
            critics = self._grow(circuits, seeds)
            draws = [self._draws(index, _CRITIC_LIFE, place) for index in batch]
            live(critics, self.images, [task] * len(batch), options.critic_life, draws)
            found.append(accuracy(critics, self.images, [task] * len(batch)))
        return [sum(values) / len(values) for values in zip(*found, strict=True)]

    def _grow(self, circuits: Sequence[dict[str, Tensor] | None], seeds: Sequence[int]) -> Population:
        options = self.options
        return grow(
            self.network,
            options.num_ways,
            circuits,
            seeds,
            weights=options.inherit == "weights",
            fill=options.fill,
            device=self.accelerator.device,
        )

    def _life_task(self, generation: int, index: int) -> Task:
        draws = seeded_generator(self.options.seed, generation, index, _TASK)
        return draw_task(self.images, self.classes["base"], self.options.num_ways, draws)

    def _critic_tasks(self, generation: int) -> list[Task]:
        options = self.options
        return [
            draw_task(
                self.images,
                self.classes["critic"],
                options.num_ways,
                seeded_generator(options.seed, generation, place, _CRITIC_TASK),
                shots=options.critic_shots,
                validation_shots=options.validation_shots,
            )
            for place in range(options.critic_tasks)
        ]

    def _seed(self, *numbers: int) -> int:
        return derived_seed(self.options.seed, self.generation, *numbers)

    def _draws(self, *numbers: int) -> torch.Generator:
        return seeded_generator(self.options.seed, self.generation, *numbers)

    def _batches(self) -> Iterator[list[int]]:
        """This process's newborns, in whole batches."""
        size = self.options.networks_per_batch
        share = self.options.population_size // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        for start in range(first, first + share, size):
            yield list(range(start, start + size))

    def _gather(self, circuits: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The circuits of all processes, in the order of their newborns."""
        stacked = {name: torch.stack([circuit[name] for circuit in circuits]) for name in circuits[0]}
        device = self.accelerator.device
        whole = {name: self.accelerator.gather(tensor.to(device)).cpu() for name, tensor in stacked.items()}
        count = len(next(iter(whole.values())))
        return [{name: tensor[index].clone() for name, tensor in whole.items()} for index in range(count)]

    def signature(self) -> dict[str, Any]:
        """What has to be the same for a run to go on as it would have."""
        settings = asdict(self.options)
        settings.pop("num_generations")  # an evolution may go on for longer
        images = {"names": self.images.names, "images": self.images.checksum}
        return {**settings, "network": asdict(self.network), "classes": self.classes, **images}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON data of a snapshot."""
        tensors = {f"{entry.id}/{name}": tensor for entry in self.pool for name, tensor in entry.tensors.items()}
        return tensors, {
            "signature": self.signature(),
            "pool": [{"id": entry.id, "score": entry.score} for entry in self.pool],
            "lineage": self.lineage.as_json(),
            "history": self.history,
        }

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        by_entry: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            id, _, name = key.partition("/")
            by_entry.setdefault(int(id), {})[name] = tensor
        self.pool = [Entry(one["id"], one["score"], by_entry[one["id"]]) for one in state["pool"]]
        self.lineage = Lineage.from_json(state["lineage"])
        self.history = list(state["history"])
