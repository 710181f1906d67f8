# SPDX-License-Identifier: Apache-2.0
"""Three sizes of the same experiment, and what the smaller ones make easier."""

from dataclasses import dataclass

from .environment import ANT, REACHER
from .evolution import EvolutionConfig
from .life import LifeConfig


__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """An evolution, and how it is examined.

    Attributes:
        unseen: tasks that no agent of the evolution learns.
        newborns: that every way to start is tried with, on every task.
        eased: how it differs from the paper's experiment, in words.
    """

    evolution: EvolutionConfig
    unseen: tuple[str, ...]
    newborns: int
    eased: str


PRESETS = {
    "smoke": Preset(
        EvolutionConfig(
            LifeConfig(
                environment=REACHER, task_argument="task", epochs=4, steps=1024, learning_rate=1e-3, offset=40.0
            ),
            tasks=("plain", "heavy", "stiff", "weak"),
            population_size=12,
            num_generations=8,
            pool_size=3,
        ),
        unseen=("light",),
        newborns=3,
        eased=(
            "an arm of two joints with four bodies instead of the ant on four terrains; 12 agents x 8 generations, 3 "
            "entries a type, lives of 4 epochs x 1,024 steps, Adam with 1e-3; 40 is added to the fitness, not 1,000"
        ),
    ),
    "laptop": Preset(
        EvolutionConfig(
            LifeConfig(
                environment=ANT,
                options={"control_cost": 0.05, "height_scale": 0.5},
                max_episode_steps=500,
                epochs=25,
                steps=2048,
            ),
            population_size=32,
            num_generations=30,
        ),
        unseen=("flat",),
        newborns=4,
        eased=(
            "terrains of half the height, actions at a quarter of the cost (0.05), episodes of 500 steps; 32 agents x "
            "30 generations, lives of 25 epochs x 2,048 steps"
        ),
    ),
    "paper": Preset(EvolutionConfig(), unseen=("flat",), newborns=30, eased="nothing"),
}
