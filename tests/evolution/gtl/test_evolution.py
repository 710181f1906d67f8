# SPDX-License-Identifier: Apache-2.0
"""Evolution: who wins and who is thanked; resumed, or shared by two processes, it is the same evolution."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffusers_learngene.evolution.gtl.evolution import Evolution, EvolutionOptions, Gene, diversity
from diffusers_learngene.evolution.gtl.networks import NetworkConfig
from diffusers_learngene.evolution.gtl.population import Life
from diffusers_learngene.evolution.gtl.tasks import ClassImages
from diffusers_learngene.evolution.lineage import Individual


OPTIONS = {
    "generations": 3,
    "population_size": 4,
    "networks_per_batch": 2,
    "pool_size": 3,
    "num_ways": 3,
    "life": Life(4, batch_size=6),
    "critic_life": Life(2, batch_size=6),
    "critic_tasks": 2,
    "critic_shots": 3,
    "validation_shots": 5,
}
CLASSES = {"base": list(range(12)), "critic": list(range(12, 18)), "novel": list(range(18, 24))}


def create(accelerator=None, **options):
    draws = torch.Generator().manual_seed(0)
    patterns = torch.rand(24, 1, 1, 8, 8, generator=draws)
    pixels = (patterns + 0.3 * torch.randn(24, 10, 1, 8, 8, generator=draws)).clamp(0, 1).mul(255).byte().flatten(0, 1)
    images = ClassImages(pixels, list(torch.arange(240).view(24, 10)), [f"class {index}" for index in range(24)])
    network = NetworkConfig("vgg", (4, 6), (1, 2), image_channels=1)
    options = EvolutionOptions(**OPTIONS | options)
    return Evolution(accelerator or Accelerator(cpu=True), images, CLASSES, network, options)


def run(folder, accelerator=None, **options):
    evolution = create(accelerator, **options)
    evolution.run(str(folder))
    return evolution


def assert_same(one, other):
    assert one.history == other.history and list(one.lineage) == list(other.lineage)
    assert [(gene.id, gene.score) for gene in one.pool] == [(gene.id, gene.score) for gene in other.pool]
    for gene, twin in zip(one.pool, other.pool, strict=True):
        assert gene.tensors.keys() == twin.tensors.keys()
        assert all(torch.equal(tensor, twin.tensors[name]) for name, tensor in gene.tensors.items())


def test_resuming_is_exact(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.generation == 4 and len(whole.lineage) == 16
    for done in (2, 3):
        folder = tmp_path / str(done)
        run(folder, generations=done - 1)
        rest = create()
        rest.run(str(folder), resume_from_checkpoint="latest")
        assert_same(whole, rest)
    other = create(seed=1)
    other.run(str(tmp_path / "other"))
    assert other.history != whole.history
    with pytest.raises(ValueError, match=r"seed=1 \(there 0\)"):
        create(seed=1).run(str(tmp_path / "whole"), resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="already holds checkpoint-4"):
        run(tmp_path / "whole")


def test_what_is_inherited_is_what_was_passed_on(tmp_path):
    """From one generation to the next, every newborn begins with the circuit of its parent."""
    evolution = run(tmp_path, generations=1)
    pool = {gene.id: gene.tensors for gene in evolution.pool}
    assert {evolution._draw_parent(index).id for index in range(4)} <= pool.keys()
    parents = [evolution._draw_parent(index) for index in range(2)]
    population = evolution._grow([parent.tensors for parent in parents], [1, 2])
    for index, parent in enumerate(parents):
        state = population.state_of(index)
        for name, tensor in parent.tensors.items():
            here = state[name][tuple(slice(size) for size in tensor.shape)]
            assert torch.equal(here, tensor), name


def select(evolution, fitness, born):
    for id, value in zip(born, fitness, strict=True):
        evolution.lineage.record(id, fitness=value)
    evolution._select(born, [{"w": torch.full((1,), float(id))} for id in born], fitness)


def test_winners_come_in_and_their_ancestors_are_thanked(tmp_path):
    evolution = create(tournament_size=4, pool_size=3, alpha=0.5, num_ways=2)
    for id, generation, parent, kept in ((0, 0, None, 1.0), (1, 1, 0, 0.8), (2, 2, 1, 0.5)):
        evolution.lineage.add(Individual(id, generation, parent, facts={"overlap": kept}))
    for id in range(8, 12):
        evolution.lineage.add(Individual(id, 3, 2 if id == 10 else None, facts={"overlap": 0.25}))
    evolution.pool = [Gene(id, 1.0, {"w": torch.full((1,), float(id))}) for id in (0, 1, 2)]
    select(evolution, [0.6, 0.7, 0.9, 0.55], [8, 9, 10, 11])  # chance is 0.5: scores .2, .4, .8, .1
    e = math.e
    expected = {
        10: 0.8,
        2: 0.5 + 0.8 / e,  # the parent
        1: 0.5 + 0.8 / e**2 * 0.25,  # what the winner's mutation left of the circuit
        0: 0.5 + 0.8 / e**4 * 0.5,  # what its parent's left
    }
    best = sorted(expected, key=lambda id: -expected[id])[:3]
    assert [gene.id for gene in evolution.pool] == best
    assert [gene.score for gene in evolution.pool] == pytest.approx([expected[id] for id in best])
    assert evolution.winner.id == best[0] and evolution.pool[0].tensors["w"].item() == best[0]


def test_random_selection_does_not_look_at_fitness():
    kept = []
    for fitness in ([0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.3, 0.2]):
        evolution = create(selection="random")
        for id in range(4):
            evolution.lineage.add(Individual(id, 0, facts={"overlap": 1.0}))
        select(evolution, fitness, range(4))
        kept.append([(gene.id, gene.score) for gene in evolution.pool])
    assert kept[0] == kept[1] and {score for _, score in kept[0]} == {1.0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population_size": 3}, "population_size=3 must be a multiple of networks_per_batch=2"),
        ({"pool_size": 0}, "pool_size=0 must be at least 1"),
        ({"num_ways": 7}, "ways=7 must lie between 2 and the 6 classes"),
        ({"critic_shots": 6}, "has 10 images, fewer than the 6"),
        ({"budget": 0.0}, r"budget=0.0 must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_evolve_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


@pytest.mark.parametrize("options", [{"inherit": "structure"}, {"fill": "random"}, {"mutation_probability": 0.0}])
def test_ablations_change_the_course(options, tmp_path):
    plain, other = run(tmp_path / "plain", generations=1), run(tmp_path / "other", generations=1, **options)
    assert plain.history[0] == other.history[0] or "fill" in options or "inherit" in options
    assert plain.history[1] != other.history[1]
    if "mutation_probability" in options:
        assert all(one.facts["swapped"] == 0 for one in other.lineage)


def test_diversity():
    one = {"w": torch.randn(2, 2, 3, 3)}
    assert diversity([one, one, one]) == pytest.approx(0, abs=1e-6) and diversity([one]) == 0.0
    far = [{"w": torch.eye(4)[i].view(1, 1, 2, 2)} for i in range(4)]
    assert diversity(far) == pytest.approx(1)


@pytest.mark.slow
def test_two_processes_evolve_as_one(tmp_path):
    root = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(root)]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, __file__, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run(tmp_path / "one")
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "state.json").read_text())
    assert state["history"] == alone.history and state["lineage"] == json.loads(json.dumps(alone.lineage.as_json()))
    shutil.rmtree(tmp_path / "one" / "checkpoint-4")
    (tmp_path / "two" / "checkpoint-4").rename(tmp_path / "one" / "checkpoint-4")
    both = create()  # what two processes left, one goes on with
    both.run(str(tmp_path / "one"), resume_from_checkpoint="latest")
    assert_same(alone, both)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Accelerator(cpu=True))
