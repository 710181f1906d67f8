# SPDX-License-Identifier: Apache-2.0
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from diffusers_learngene.evolution.grl.evaluation import STARTS, curves_of, examine, summarise
from diffusers_learngene.evolution.grl.evolution import EvolutionConfig, evolve, load
from diffusers_learngene.evolution.grl.life import Life, LifeConfig, Statistics, fitness_of
from diffusers_learngene.evolution.grl.network import Network
from diffusers_learngene.evolution.grl.workers import Job, Workers
from diffusers_learngene.runs.checkpoints import list_checkpoints


LIFE = LifeConfig("LearngeneReacher-v0", "task", epochs=1, steps=64, passes=1, offset=60.0)
TINY = EvolutionConfig(LIFE, tasks=("plain", "weak"), population_size=7, num_generations=3, pool_size=3)


@pytest.fixture
def workers():
    with Workers(Accelerator(cpu=True), 1) as workers:
        yield workers


@pytest.fixture
def lived(monkeypatch):
    """Lives that take no time; an agent is as good as the sum of its first biases, and a life adds 1 to every tensor
    and to the mean of what is observed. Returns the jobs."""
    jobs = []

    def run(self):
        jobs.append(self)
        network = Network(3, 1, seed=self.seed)
        network.load_(self.inherited or {})
        birth = network.actor()
        score = float(birth["0.bias"].mean()) + self.seed % 97 / 97
        trained = {name: array + 1 for name, array in birth.items()}
        given = self.statistics or Statistics.fresh(3)
        return Life(birth, trained, given, Statistics(given.mean + 1, given.variance, 9), [score], 10, {"act": 1.0})

    monkeypatch.setattr(Job, "run", run)
    return jobs


def assert_same(one, other):
    assert one.pool == other.pool and one.parents == other.parents
    assert list(one.lineage) == list(other.lineage)
    for key in ("fitness", "return", "instinct", "probabilities"):
        assert [record[key] for record in one.history] == [record[key] for record in other.history]
    assert one.heirs.keys() == other.heirs.keys()
    for id, heir in one.heirs.items():
        assert all(np.array_equal(array, other.heirs[id].actor[name]) for name, array in heir.actor.items())
        assert np.array_equal(heir.statistics.mean, other.heirs[id].statistics.mean)


def test_a_generation_of_50_leaves_17_and_a_pool_of_7_each(lived, workers, tmp_path):
    config = replace(TINY, population_size=50, pool_size=7, num_generations=2)
    found = evolve(config, workers, tmp_path)
    assert len(found.lineage) == len(lived) == 150 and found.generation == 3
    counts = [sum(entry.gene_type == t for entry in found.pool) for t in {entry.gene_type for entry in found.pool}]
    assert counts == [7] * 15 and len({entry.id for entry in found.pool}) == 105
    assert found.heirs.keys() == {entry.agent for entry in found.pool}
    young = [entry for entry in found.pool if entry.agent >= 50]
    for generation in (1, 2):
        assert len({entry.agent for entry in young if entry.agent // 50 == generation}) <= 17
    assert sum(found.history[-1]["probabilities"].values()) == pytest.approx(1)
    for job, one in zip(lived, found.lineage, strict=True):
        assert job.task == one.facts["task"] and one.fitness == fitness_of(one.facts["scores"], 60.0)
        layers = {int(name[0]) for name in job.inherited or {}}
        assert sorted(layers) == one.facts["gene"] and (one.parent is None) == (not layers)


@pytest.mark.parametrize("heritage, learnt", [("trained", True), ("birth", False), ("random", None)])
def test_what_is_passed_on(lived, workers, tmp_path, heritage, learnt):
    """The biases of newborns say how many lives were inherited: fresh ones are 0, and a life adds 1."""
    evolve(replace(TINY, heritage=heritage, population_size=12), workers, tmp_path)
    biases = [array.max() for job in lived for name, array in (job.inherited or {}).items() if name.endswith("bias")]
    if learnt is None:
        assert biases == []
    else:
        assert len(biases) > 40 and min(biases) == (1 if learnt else 0) and (max(biases) >= 2) == learnt


@pytest.mark.parametrize("heritage", ["trained", "birth", "random"])
def test_statistics_are_passed_on_as_layers_are(lived, workers, tmp_path, heritage):
    life = replace(LIFE, inherit_statistics=True)
    evolve(replace(TINY, life=life, heritage=heritage, population_size=12), workers, tmp_path)
    for job in lived:
        assert (job.statistics is None) == (job.inherited is None)
        if job.statistics is not None:
            assert (job.statistics.mean.max() >= 1) == (heritage == "trained")
    assert any(job.statistics for job in lived) == (heritage != "random")


def test_lives_in_which_no_episode_ends_are_told(workers, tmp_path):
    life = replace(LIFE, steps=32)  # of episodes of 50
    with pytest.warns(UserWarning, match="7 of 7 lives of generation 0 ended no episode.*steps=32"):
        evolve(replace(TINY, life=life, num_generations=0), workers, tmp_path)


def test_resuming_is_exact(workers, tmp_path):
    whole = evolve(TINY, workers, tmp_path / "whole", checkpoints_total_limit=None)
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    for generation in (1, 3):
        snapshot = tmp_path / "whole" / f"checkpoint-{generation}"
        again = evolve(TINY, workers, tmp_path / f"from {generation}", resume=snapshot)
        assert_same(whole, again)
    assert_same(whole, load(tmp_path / "whole" / "checkpoint-4", TINY))
    longer = replace(TINY, num_generations=4)  # may go on
    assert evolve(longer, workers, tmp_path / "longer", resume=tmp_path / "whole" / "checkpoint-4").generation == 5
    with pytest.raises(ValueError, match=re.escape("seed=1 (there 0)")):
        load(tmp_path / "whole" / "checkpoint-4", replace(TINY, seed=1))


@pytest.mark.slow
def test_two_workers_live_as_one(workers, tmp_path):
    config = replace(TINY, num_generations=1)
    alone = evolve(config, workers, tmp_path / "one")
    with Workers(Accelerator(cpu=True), 2) as two:
        assert_same(alone, evolve(config, two, tmp_path / "two"))
        assert two.steps_per_second > 0


class Death:
    config = None

    def run(self):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_worker_is_an_error_that_says_what_to_do():
    with (
        Workers(Accelerator(cpu=True), 2) as two,
        pytest.raises(RuntimeError, match="worker processes died.*--resume"),
    ):
        two.run([Death(), Death()], "death")


class Sleep:
    config = None

    def __init__(self, seconds):
        self.seconds = seconds

    def run(self):
        time.sleep(self.seconds)


def sleep_for_ever():
    """What the next test kills: two workers, of which one lives and the other waits for a job."""
    with Workers(Accelerator(cpu=True), 2) as two:
        jobs = [two._pool.submit(os.getpid) for _ in range(20)]
        two._pool.submit(Sleep(1000).run)
        print({job.result() for job in jobs}, list(two._pool._processes), flush=True)
        time.sleep(1000)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed():
    command = [sys.executable, __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[3])])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = {int(number) for number in re.findall(r"\d+", parent.stdout.readline())}
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def test_errors_come_before_any_life(workers, tmp_path, lived):
    with pytest.raises(ValueError, match="population_size=2 is too small for a tournament of 3"):
        evolve(replace(TINY, population_size=2), workers, tmp_path)
    with pytest.raises(ValueError, match="num_workers=0 must be at least 1"):
        Workers(Accelerator(cpu=True), 0)
    assert lived == []


def test_examination_compares_like_with_like(lived, workers, tmp_path):
    found = evolve(TINY, workers, tmp_path)
    del lived[:]
    results = examine(found, TINY, ("plain", "weak", "light"), 2, workers)
    by_start = {start: lived[6 * index : 6 * index + 6] for index, start in enumerate(STARTS)}
    seeds = [[job.seed for job in jobs] for jobs in by_start.values()]
    assert all(of_start == seeds[0] for of_start in seeds) and len(set(seeds[0])) == 6
    winner = found.winner()
    layers = {
        start: [{int(name[0]) for name in job.inherited or {}} for job in jobs] for start, jobs in by_start.items()
    }
    assert layers["gene"] == [set(winner.gene_type)] * 6 and layers["scratch"] == [set()] * 6
    assert layers["full transfer"] == [set(range(6))] * 6
    assert all(len(other) == 2 and other != set(winner.gene_type) for other in layers["other layers"])
    rows = summarise(results, ["light"])
    assert [row["start"] for row in rows] == list(STARTS)
    scores = [life.scores[0] for task in ("plain", "weak") for life in results["gene"][task]]
    assert rows[0]["area"] == rows[0]["first epoch"] == pytest.approx(sum(scores) / 4)
    assert curves_of(results)["light"]["gene"] == [
        (1, pytest.approx(sum(life.scores[0] for life in results["gene"]["light"]) / 2))
    ]


if __name__ == "__main__":
    sleep_for_ever()
