# SPDX-License-Identifier: Apache-2.0
"""Who descends from whom: every newborn of an evolution, with its parent, its fitness and how it came to be."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


__all__ = ["Individual", "Lineage"]


@dataclass(frozen=True)
class Individual:
    """A newborn.

    Attributes:
        id: counts all newborns of the evolution.
        generation: it was born in; 0 is the first.
        parent: id of the one whose learngene it inherited; None if it inherited nothing.
        fitness: once it has lived.
        facts: anything else that is worth a line in JSON: task, gene type, mutation, ...
    """

    id: int
    generation: int
    parent: int | None = None
    fitness: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Lineage:
    """All individuals of an evolution, by id; those that were born first come first."""

    def __init__(self, individuals: list[Individual] | None = None) -> None:
        self._individuals: dict[int, Individual] = {}
        for individual in individuals or []:
            self.add(individual)

    def add(self, individual: Individual) -> None:
        """Raises a ValueError if the id is taken, or the parent is unknown or not of an earlier generation."""
        if individual.id in self._individuals:
            raise ValueError(f"id={individual.id} is there already: {self[individual.id]}.")
        if individual.parent is not None:
            parent = self._individuals.get(individual.parent)
            if parent is None or parent.generation >= individual.generation:
                raise ValueError(f"the parent of {individual} is {parent}: it must be of an earlier generation.")
        self._individuals[individual.id] = individual

    def record(self, id: int, *, fitness: float, **facts: Any) -> None:
        """Note how the life of an individual went."""
        lived = self[id]
        self._individuals[id] = replace(lived, fitness=fitness, facts=lived.facts | facts)

    def __getitem__(self, id: int) -> Individual:
        return self._individuals[id]

    def __len__(self) -> int:
        return len(self._individuals)

    def __iter__(self) -> Iterator[Individual]:
        return iter(self._individuals.values())

    def ancestors(self, id: int) -> list[int]:
        """Parent, grandparent, ..., back to one that inherited nothing."""
        found = []
        parent = self[id].parent
        while parent is not None:
            found.append(parent)
            parent = self[parent].parent
        return found

    def of_generation(self, generation: int) -> list[Individual]:
        return [individual for individual in self if individual.generation == generation]

    def fitness(self) -> list[list[float]]:
        """By generation, the fitness of its newborns, as far as they have lived."""
        last = max((individual.generation for individual in self), default=-1)
        return [
            [one.fitness for one in self.of_generation(generation) if one.fitness is not None]
            for generation in range(last + 1)
        ]

    def as_json(self) -> list[dict[str, Any]]:
        """For a JSON file."""
        return [asdict(individual) for individual in self]

    @classmethod
    def from_json(cls, values: Any) -> "Lineage":
        """Of what `as_json` gave.

        Raises:
            ValueError: something else, or individuals that `add` refuses.
        """
        names = {entry.name for entry in fields(Individual)}
        if not isinstance(values, list) or not all(isinstance(v, dict) and v.keys() == names for v in values):
            raise ValueError(f"a lineage is a list of individuals with {sorted(names)}, which this is not.")
        return cls([Individual(**value) for value in values])
