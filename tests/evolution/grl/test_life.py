# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from diffusers_learngene.evolution.grl.genes import tensors_of
from diffusers_learngene.evolution.grl.life import (
    LifeConfig,
    Statistics,
    fitness_of,
    generalised_advantages,
    live,
    make_environment,
)


SHORT = LifeConfig("LearngeneReacher-v0", "task", epochs=2, steps=128, learning_rate=1e-3)


def test_the_papers_life():
    life = LifeConfig()
    assert (life.epochs, life.steps, life.batch_size, life.passes) == (50, 4096, 64, 10)
    assert (life.learning_rate, life.discount, life.gae_lambda, life.reward_scale) == (3e-4, 0.99, 0.95, 0.1)
    assert make_environment(life, "curve").spec.max_episode_steps == 3000


def test_fitness_is_over_the_whole_life_and_without_the_worst_epochs():
    assert fitness_of([-500.0, None, -900.0, -1500.0], 1000.0) == 300
    assert fitness_of([-1500.0, None], 1000.0) == fitness_of([], 1000.0) == 0


def test_running_statistics_are_those_of_everything_seen():
    chance = np.random.default_rng(0)
    parts = [chance.normal(3, 2, size=(n, 4)) for n in (10, 1, 50)]
    found = Statistics.fresh(4)
    assert found.normalise(np.array([9.0, -9, 1, 0])) == pytest.approx([5, -5, 1, 0])
    for part in parts:
        found = found.update(part)
    together = np.concatenate(parts)
    assert found.mean == pytest.approx(together.mean(0)) and found.variance == pytest.approx(together.var(0))
    assert found.count == 61


def test_advantages():
    """An episode that ends after the second of four steps, by hand."""
    config = LifeConfig(discount=0.5, gae_lambda=0.5)
    rewards, values = np.array([1.0, 2, 3, 4]), [10.0, 20, 30, 40, 50]
    found = generalised_advantages(rewards, np.array([False, True, False, False]), values, config)
    last, second = 4 + 25 - 40, 2 - 20
    assert found == pytest.approx([1 + 10 - 10 + 0.25 * second, second, 3 + 20 - 30 + 0.25 * last, last])


def test_a_life_is_a_function_of_task_seed_and_layers():
    one, same, other = live(SHORT, "plain", 3), live(SHORT, "plain", 3), live(SHORT, "weak", 3)
    assert one.scores == same.scores != other.scores and one.steps == 256 and len(one.scores) == 2
    for name, array in one.actor.items():
        assert np.array_equal(array, same.actor[name]) and np.array_equal(one.birth[name], other.birth[name])
    assert one.statistics.count == 256 and one.birth_statistics.count == 0 and set(one.seconds) == {"act", "learn"}
    assert any(not np.array_equal(array, one.birth[name]) for name, array in one.actor.items())


LIVE = """
import hashlib
from diffusers_learngene.evolution.grl.life import LifeConfig, live
life = live(LifeConfig("LearngeneReacher-v0", "task", epochs=2, steps=2048, batch_size=2048), "plain", 3)
print(hashlib.sha256(b"".join(array.tobytes() for array in life.actor.values())).hexdigest())
"""


@pytest.mark.slow
def test_a_life_does_not_depend_on_how_many_threads_there_could_be():
    """Only a new process reads what its environment says of them."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, "2")  # here it is 1
    there = subprocess.check_output([sys.executable, "-c", LIVE], env=environment, timeout=100, text=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(LIVE, {})
    assert here.getvalue() == there != ""


def test_inherited_layers_are_there_at_birth_and_the_others_fresh():
    father, fresh = live(SHORT, "plain", 0), live(SHORT, "plain", 1)
    child = live(SHORT, "plain", 1, tensors_of(father.actor, (1, 5)))
    for name, array in child.birth.items():
        expected = father.actor if name[0] in "15" else fresh.birth
        assert np.array_equal(array, expected[name]), name
    assert child.scores[0] != fresh.scores[0]
    assert not np.array_equal(child.actor["1.weight"], father.actor["1.weight"])  # it learns on


def test_statistics_are_inherited_if_given():
    father = live(SHORT, "plain", 0)
    assert live(SHORT, "plain", 1, None, father.statistics).statistics.count == 512


def test_learning_raises_the_return():
    found = live(replace(SHORT, epochs=10, steps=1024), "plain", 100).scores
    assert sum(found[-2:]) / 2 > sum(found[:2]) / 2 + 2
