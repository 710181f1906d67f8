# SPDX-License-Identifier: Apache-2.0
"""Generations: seeded, resumed bit for bit, and the same whoever computes them."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from diffusers_learngene.evolution.gtl.evolution import Evolution
from diffusers_learngene.evolution.gtl.networks import NetworkConfig
from diffusers_learngene.evolution.gtl.options import EvolutionOptions
from diffusers_learngene.evolution.gtl.population import Life
from diffusers_learngene.evolution.gtl.tasks import ClassImages
from forks import together


TINY = NetworkConfig("vgg", (4, 6), (1, 2), image_channels=1)
CLASSES = {"base": list(range(12)), "critic": list(range(12, 18)), "novel": list(range(18, 24))}
OPTIONS = EvolutionOptions(
    num_generations=3,
    population_size=4,
    tournament_size=2,
    pool_size=3,
    num_ways=3,
    life=Life(3, batch_size=6),
    critic_life=Life(3, batch_size=6),
    critic_tasks=2,
    critic_shots=4,
    validation_shots=4,
    networks_per_batch=2,
)


def patterns():
    draws = torch.Generator().manual_seed(0)
    pixels = torch.rand(24, 1, 1, 8, 8, generator=draws) + 0.3 * torch.randn(24, 10, 1, 8, 8, generator=draws)
    rows = list(torch.arange(240).view(24, 10))
    return ClassImages(pixels.clamp(0, 1).mul(255).byte().flatten(0, 1), rows, [str(index) for index in range(24)])


def evolution(accelerator=None, **changes):
    return Evolution(accelerator or Accelerator(cpu=True), patterns(), CLASSES, TINY, replace(OPTIONS, **changes))


def outcome(evolved):
    """All that there is after an evolution, as text."""
    tensors, state = evolved.state()
    state.pop("signature")
    numbers = {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
    return json.dumps([state, numbers, evolved.winner.id], sort_keys=True)  # a file lists tensors by name


def test_resuming_is_exact(tmp_path):
    whole, half = evolution(), evolution(num_generations=1)
    whole.run(str(tmp_path / "whole"))
    half.run(str(tmp_path / "halves"))
    resumed = evolution()
    resumed.run(str(tmp_path / "halves"), resume_from_checkpoint="latest")
    assert half.generation == 2 and resumed.generation == whole.generation == 4
    assert outcome(resumed) == outcome(whole) != outcome(half)
    with pytest.raises(ValueError, match=r"seed=1 \(there 0\)"):
        evolution(seed=1).run(str(tmp_path / "whole"), resume_from_checkpoint="latest")


def test_threads_change_nothing(tmp_path):
    """Of a network wide enough for several to share its sums."""
    before, outcomes = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            network = NetworkConfig.named("vgg11-smoke", 1)
            options = replace(OPTIONS, num_generations=1, population_size=2, critic_tasks=1)
            evolved = Evolution(Accelerator(cpu=True), patterns(), CLASSES, network, options)
            evolved.run(str(tmp_path / str(threads)))
            outcomes.add(outcome(evolved))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(outcomes) == 1


@pytest.mark.parametrize("change", ["a pixel", "a class", "an option", "the network"])
def test_nothing_goes_on_from_a_snapshot_of_something_else(tmp_path, change):
    evolution(num_generations=1).run(str(tmp_path))
    images, network, options = patterns(), TINY, OPTIONS
    if change == "a pixel":
        images.pixels[7, 0, 3, 3] ^= 1
    elif change == "a class":  # two classes swap an image each
        images.rows[0][0], images.rows[1][0] = images.rows[1][0].clone(), images.rows[0][0].clone()
    elif change == "an option":
        options = replace(OPTIONS, critic_life=Life(3, batch_size=6, weight_decay=0.0))
    else:
        network = NetworkConfig("vgg", (4, 7), (1, 2), image_channels=1)
    name = {"an option": "critic_life.weight_decay", "the network": "network.widths"}.get(change, "images")
    other = Evolution(Accelerator(cpu=True), images, CLASSES, network, options)
    with pytest.raises(ValueError, match=rf"of a training with other settings than {name}="):
        other.run(str(tmp_path), resume_from_checkpoint="latest")


def test_a_lineage_is_kept(tmp_path):
    evolved = evolution()
    evolved.run(str(tmp_path))
    assert len(evolved.lineage) == 16 and [len(row) for row in evolved.lineage.fitness()] == [4] * 4
    assert all((one.parent is None) == (one.generation == 0) for one in evolved.lineage)
    assert len(evolved.pool) == 3 and evolved.winner.score == max(entry.score for entry in evolved.pool)
    assert {one.generation for one in evolved.lineage if one.facts["swapped"]} <= {1, 2, 3}


def test_no_mutation_keeps_all_of_the_circuit(tmp_path):
    evolved = evolution(mutation_probability=0.0)
    evolved.run(str(tmp_path))
    assert all(one.facts["swapped"] == 0 and one.facts["overlap"] == 1 for one in evolved.lineage)


@pytest.mark.parametrize("changes", [{"selection": "random"}, {"inherit": "structure"}, {"fill": "random"}], ids=str)
def test_an_ablation_is_another_evolution(tmp_path, changes):
    usual, other = evolution(num_generations=1), evolution(num_generations=1, **changes)
    usual.run(str(tmp_path / "usual"))
    other.run(str(tmp_path / "other"))
    assert outcome(usual) != outcome(other)


def test_a_population_that_does_not_divide():
    with pytest.raises(ValueError, match="population_size=5 must be a multiple of networks_per_batch=2"):
        replace(OPTIONS, population_size=5)
    with pytest.raises(ValueError, match="num_ways|ways=7"):
        evolution(num_ways=7)


def two_processes(folder):
    """What each of them runs."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    evolved = evolution(accelerator)
    evolved.run(str(folder / "checkpoints"))
    accelerator.end_training()
    return outcome(evolved)


@pytest.mark.slow
def test_two_processes_evolve_as_one(tmp_path):
    one, other = together(two_processes, tmp_path)
    alone = evolution()
    alone.run(str(tmp_path / "alone"))
    assert one == other == outcome(alone)
