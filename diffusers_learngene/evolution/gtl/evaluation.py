# SPDX-License-Identifier: Apache-2.0
"""What a circuit is worth on classes that no life and no critic has seen, beside other starts.

    descendant   the evolved circuit in a network that is random otherwise
    scratch      a network that is random
    random       as many random channels of a trained network, inherited in the same way
    magnitude    the channels of the same network whose kernels have the largest L1 norms
    full         all of that network, but its head

The trained network has learned all base classes at once, for as many steps and images as the winner and its ancestors
lived together. All starts learn the same tasks from the same batches at the same rate; each task has random weights of
its own, which its starts share. `centroid` is the accuracy of the nearest class mean before any training: what
the features are worth by themselves. At 0 steps the head is random, for all.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...runs.sampler import derived_seed, seeded_generator
from ...runs.threads import one_torch_thread
from .circuit import circuit_sizes, extract, first_sets, largest_sets, random_sets
from .networks import NetworkConfig, create_network, layout_of, widths_of
from .population import Life, Population, accuracy, centroid_accuracy, grow, live
from .tasks import ClassImages, Task, draw_task


__all__ = ["Starts", "compare", "draw_novel_tasks", "other_starts", "pretrain", "summarize"]

_PRETRAIN, _RANDOM, _TASK, _NETWORK, _LIFE = range(100, 105)  # what for; not the numbers of `evolution`

Starts = dict[str, list[dict[str, Tensor] | None]]  # by name and task, what is inherited


@one_torch_thread()
def pretrain(
    images: ClassImages,
    classes: Sequence[int],
    network: NetworkConfig,
    life: Life,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The state dict of a network that has learned all these classes, on the CPU."""
    task = draw_task(images, classes, len(classes), seeded_generator(seed, _PRETRAIN))
    start = create_network(network, len(classes), seed=derived_seed(seed, _PRETRAIN))
    population = Population([start]).to(device)
    live(population, images, [task], life, [seeded_generator(seed, _PRETRAIN, 1)], desc="pretrain")
    return {name: tensor.detach().cpu().clone() for name, tensor in population.state_of(0).items()}


def other_starts(
    trained: Mapping[str, Tensor], network: NetworkConfig, circuit: Mapping[str, Tensor], tasks: int, *, seed: int
) -> Starts:
    """What to compare a circuit with, by name: taken from a trained network of the same shape; random channels are
    drawn anew for each task.
    """
    layout = layout_of(network)
    widths = widths_of(trained, layout)
    sizes = circuit_sizes(circuit, layout)
    whole = first_sets({kernel.writes: widths[kernel.writes] for kernel in layout})
    draws = [random_sets(widths, sizes, seeded_generator(seed, _RANDOM, task)) for task in range(tasks)]
    return {
        "scratch": [None] * tasks,
        "random": [extract(trained, layout, sets) for sets in draws],
        "magnitude": [extract(trained, layout, largest_sets(trained, layout, sizes))] * tasks,
        "full": [extract(trained, layout, whole)] * tasks,
    }


def draw_novel_tasks(
    images: ClassImages,
    classes: Sequence[int],
    count: int,
    *,
    num_ways: int,
    shots: int,
    validation_shots: int,
    seed: int,
) -> list[Task]:
    """The tasks of a comparison.

    Args:
        num_ways, shots, validation_shots: see `draw_task`.

    Raises:
        ValueError: there are not so many classes or images.
    """
    return [
        draw_task(
            images,
            classes,
            num_ways,
            seeded_generator(seed, _TASK, task),
            shots=shots,
            validation_shots=validation_shots,
        )
        for task in range(count)
    ]


@one_torch_thread()
def compare(
    images: ClassImages,
    novel: Sequence[Task],
    network: NetworkConfig,
    starts: Starts,
    life: Life,
    *,
    eval_steps: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Train every start on every task, all of them at once.

    Args:
        novel: the tasks, all of the same size; see `draw_novel_tasks`.
        network: that inherits.
        life: of each; the end of it is evaluated, too.
        eval_steps: after which to evaluate.

    Returns:
        By start and column ("centroid", "0", ..., "end"), the accuracy on each task.
    """
    count, tasks = len(novel), [*novel] * len(starts)
    inherited = [circuit for circuits in starts.values() for circuit in circuits]
    seeds = [derived_seed(seed, _NETWORK, task) for task in range(count)] * len(starts)
    population = grow(network, len(novel[0].classes), inherited, seeds, device=device)
    columns = {"centroid": centroid_accuracy(population, images, tasks)}

    def evaluate(step: int) -> None:
        columns["end" if step == life.steps else str(step)] = accuracy(population, images, tasks)

    draws = [seeded_generator(seed, _LIFE, task) for _ in starts for task in range(count)]
    watch = dict.fromkeys([step for step in eval_steps if step < life.steps] + [life.steps], evaluate)
    live(population, images, tasks, life, draws, watch=watch, desc="novel classes")
    return {
        name: {column: values[place * count : (place + 1) * count] for column, values in columns.items()}
        for place, name in enumerate(starts)
    }


def summarize(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """A row for each start, with mean and standard deviation over tasks in every column."""

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"

    return [
        {"start": name, **{column: cell(values) for column, values in columns.items()}}
        for name, columns in found.items()
    ]
