# SPDX-License-Identifier: Apache-2.0
"""How to evolve: the numbers that the papers do not give, and why these."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .circuit import Fill
from .population import Life


__all__ = ["EvolutionOptions"]


@dataclass(frozen=True)
class EvolutionOptions:
    """How to evolve.

    Attributes:
        num_generations: after the first one, which inherits nothing.
        population_size: newborns of a generation.
        tournament_size: newborns of which one wins.
        pool_size: circuits that are kept.
        num_ways: classes of a task.
        life, critic_life: how newborns, and how critics are trained.
        critic_tasks: for each newborn; their mean accuracy is its fitness.
        critic_shots, validation_shots: images of each class that critics train on, and are validated on.
        budget: share of the parameters that is inherited.
        mutation_probability: of each index set; 0: no mutation. At 0.5 newborns gained less from generation to
            generation: a channel that comes in was not trained to do without those outside.
        mutation_rate: share of its channels that is then swapped.
        alpha: what scores are multiplied by with every generation. beta: of `ancestor_credit`.
        selection: "random" draws winners and parents without regard to their fitness.
        inherit: "structure" passes on which channels read which, and no weights ("Darwinian").
        fill: see `inherit_`.
        networks_per_batch: that are trained as one; see `population`.
        seed: of everything.

    Raises:
        ValueError: a population that does not divide into batches.
    """

    num_generations: int = 20
    population_size: int = 16
    tournament_size: int = 2
    pool_size: int = 6
    num_ways: int = 5
    life: Life = field(default_factory=lambda: Life(100))
    critic_life: Life = field(default_factory=lambda: Life(20))
    critic_tasks: int = 2
    critic_shots: int = 10
    validation_shots: int = 20
    budget: float = 0.2
    mutation_probability: float = 0.1
    mutation_rate: float = 0.1
    alpha: float = 0.3
    beta: float = 1 / math.e
    selection: Literal["tournament", "random"] = "tournament"
    inherit: Literal["weights", "structure"] = "weights"
    fill: Fill = "zero"
    networks_per_batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_generations", "pool_size", "tournament_size", "critic_tasks", "networks_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.population_size < 1 or self.population_size % self.networks_per_batch:
            raise ValueError(
                f"population_size={self.population_size} must be a multiple of "
                f"networks_per_batch={self.networks_per_batch}."
            )
