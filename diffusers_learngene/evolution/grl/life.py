# SPDX-License-Identifier: Apache-2.0
"""One life: a newborn with some inherited layers learns one task by PPO. A pure function of (task, seed, layers).

A life is `epochs` times: act for `steps` steps, then learn from them. The score of an epoch is the mean return of the
episodes that ended in it; the fitness is the mean over the whole life, so that it rewards learning fast, not only
being good in the end:

    R = offset + mean of the epoch scores above -offset        (0 if there are none)

As in the authors' code rewards are scaled by 0.1 for learning, an episode that ran out of time counts as ended, and
observations are normalised by running statistics that change between epochs and begin at mean 0, variance 1 with every
newborn. (Their statistics count old observations again in each epoch; ours count each once.)
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ...runs.sampler import derived_seed
from ...runs.threads import one_torch_thread
from .network import Actor, Adam, Array, Batch, LossWeights, Network


__all__ = ["Life", "LifeConfig", "Statistics", "fitness_of", "live", "make_environment"]

_CLIP_OBSERVATIONS = 5.0


@dataclass(frozen=True)
class LifeConfig:
    """What a life consists of; the defaults are the paper's.

    Attributes:
        environment: gymnasium id.
        task_argument: the keyword of the environment that says which task.
        options: other keywords of the environment.
        max_episode_steps: time limit; None: the environment's own.
        epochs, steps: of a life, and of an epoch.
        batch_size, passes: minibatches, and how often every step is learnt from.
        offset: what is added to the fitness, and, negative, what an epoch's score has to exceed to count.
        inherit_statistics: whether a newborn starts with its father's observation statistics, too; the paper: not,
            so an inherited first layer sees other numbers in the first epoch than it was trained for.
    """

    environment: str = "LearngeneAnt-v0"
    task_argument: str = "terrain"
    options: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    epochs: int = 50
    steps: int = 4096
    batch_size: int = 64
    passes: int = 10
    learning_rate: float = 3e-4
    discount: float = 0.99
    gae_lambda: float = 0.95
    max_grad_norm: float = 0.5
    reward_scale: float = 0.1
    offset: float = 1000.0
    inherit_statistics: bool = False
    loss: LossWeights = LossWeights()


@dataclass
class Statistics:
    """Running mean and variance of observations, each (size,), and how many steps they are of."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    count: int = 0

    def __post_init__(self) -> None:
        self._scale = 1 / np.sqrt(self.variance + 1e-8)

    @classmethod
    def fresh(cls, size: int) -> "Statistics":
        return cls(np.zeros(size), np.ones(size))

    def update(self, observations: NDArray[np.float64]) -> "Statistics":
        """With these observations (n, size) in addition."""
        mean, variance, count = observations.mean(0), observations.var(0), len(observations)
        total = self.count + count
        apart = mean - self.mean
        return Statistics(
            self.mean + apart * count / total,
            (self.variance * self.count + variance * count + apart**2 * self.count * count / total) / total,
            total,
        )

    def normalise(self, observation: NDArray[np.float64]) -> Array:
        """In units of the standard deviation, within [-5, 5]."""
        scaled = observation - self.mean
        scaled *= self._scale
        np.maximum(scaled, -_CLIP_OBSERVATIONS, out=scaled)
        np.minimum(scaled, _CLIP_OBSERVATIONS, out=scaled)
        return scaled.astype(np.float32)


@dataclass(frozen=True)
class Life:
    """How it went.

    Attributes:
        birth, actor: the actor before and after.
        birth_statistics, statistics: of observations, before and after.
        scores: by epoch; None where no episode ended. The first is from before any learning.
        seconds: it took, by what for: "act" (policy and simulator), "learn".
    """

    birth: Actor
    actor: Actor
    birth_statistics: Statistics
    statistics: Statistics
    scores: list[float | None]
    steps: int
    seconds: dict[str, float]


def fitness_of(scores: Sequence[float | None], offset: float) -> float:
    """R, see the module."""
    counted = [score for score in scores if score is not None and score > -offset]
    return offset + sum(counted) / len(counted) if counted else 0.0


def make_environment(config: LifeConfig, task: str, **options: Any) -> Any:
    """The environment of a task.

    Raises:
        ValueError: gymnasium or MuJoCo is missing. What gymnasium says of an unknown id comes as it is.
    """
    try:
        import gymnasium

        from . import environment  # noqa: F401  # registers ours
    except ImportError as error:
        raise ValueError(
            f"lives need gymnasium and MuJoCo: pip install 'diffusers-learngene[rl]' ({error})."
        ) from error
    return gymnasium.make(
        config.environment,
        max_episode_steps=config.max_episode_steps,
        disable_env_checker=True,
        **{config.task_argument: task},
        **config.options,
        **options,
    )


@one_torch_thread()  # which draws the fresh layers
@threadpool_limits.wrap(1)  # of numpy
def live(
    config: LifeConfig,
    task: str,
    seed: int,
    inherited: Mapping[str, Array] | None = None,
    statistics: Statistics | None = None,
) -> Life:
    """A whole life; in one thread, wherever and among however many others it is lived.

    Args:
        seed: of the fresh layers, the environment and all chance.
        inherited: tensors of the actor that are not fresh; see `network.Actor`.
        statistics: of observations, to start with.
    """
    environment = make_environment(config, task)
    observation, _ = environment.reset(seed=derived_seed(seed, 0) % 2**31)
    chance = np.random.default_rng(derived_seed(seed, 1))
    network = Network(len(observation), environment.action_space.shape[0], seed=derived_seed(seed, 2))
    network.load_(inherited or {})
    birth, optimizer = network.actor(), Adam(network, config.learning_rate, config.max_grad_norm)
    statistics = birth_statistics = statistics or Statistics.fresh(len(observation))
    rollout = _Rollout(config, len(observation), network.action_size)
    scores: list[float | None] = []
    seconds = {"act": 0.0, "learn": 0.0}
    for _ in range(config.epochs):
        begin = time.perf_counter()
        observation, returns = rollout.collect(environment, observation, network, statistics, chance)
        middle = time.perf_counter()
        scores.append(sum(returns) / len(returns) if returns else None)
        if not np.isfinite(rollout.observations).all():
            raise ValueError(f"{config.environment} with {task!r} gave observations that are not finite.")
        batch = rollout.batch(network, statistics.normalise(observation))
        learn_(network, optimizer, batch, config, chance)
        statistics = statistics.update(rollout.raw)
        seconds["act"] += middle - begin
        seconds["learn"] += time.perf_counter() - middle
    environment.close()
    steps = config.epochs * config.steps
    return Life(birth, network.actor(), birth_statistics, statistics, scores, steps, seconds)


def learn_(network: Network, optimizer: Adam, batch: Batch, config: LifeConfig, chance: np.random.Generator) -> None:
    """All passes of PPO over one epoch's steps."""
    parts = (batch.observations, batch.actions, batch.log_probs, batch.values, batch.advantages, batch.returns)
    for _ in range(config.passes):
        order = chance.permutation(len(batch.actions))
        shuffled = [part[order] for part in parts]
        for start in range(0, len(order), config.batch_size):
            network.backward_(Batch(*(part[start : start + config.batch_size] for part in shuffled)), config.loss)
            optimizer.step()


class _Rollout:
    """The steps of one epoch, in buffers that all epochs of a life share."""

    def __init__(self, config: LifeConfig, observation_size: int, action_size: int) -> None:
        self.config = config
        self.raw = np.empty((config.steps, observation_size))
        self.observations = np.empty((config.steps, observation_size), np.float32)
        self.actions = np.empty((config.steps, action_size), np.float32)
        self.rewards, self.ends = np.empty(config.steps), np.empty(config.steps, bool)
        self._return = 0.0  # of the episode that is going on; it may have begun an epoch earlier

    def collect(
        self,
        environment: Any,
        observation: NDArray[np.float64],
        network: Network,
        statistics: Statistics,
        chance: np.random.Generator,
    ) -> tuple[NDArray[np.float64], list[float]]:
        """Act; the observation after the last step, and the returns of the episodes that ended."""
        returns: list[float] = []
        noise = chance.standard_normal(self.actions.shape, dtype=np.float32)
        for step in range(len(self.rewards)):
            self.raw[step] = observation
            seen = self.observations[step] = statistics.normalise(observation)
            mean, std = network.act(seen)
            action = self.actions[step] = mean + std * noise[step]
            observation, reward, terminated, truncated, _ = environment.step(action)
            self.rewards[step], self.ends[step] = reward, terminated or truncated
            self._return += reward
            if terminated or truncated:
                returns.append(float(self._return))
                self._return = 0.0
                observation, _ = environment.reset()
        return observation, returns

    def batch(self, network: Network, next_observation: Array) -> Batch:
        """The steps with values, advantages and returns; `next_observation` is the normalised one after the last."""
        config = self.config
        log_probs, values = network.evaluate(self.observations, self.actions)
        _, next_value = network.evaluate(next_observation[None], self.actions[:1])
        advantages = generalised_advantages(
            config.reward_scale * self.rewards, self.ends, [*values.tolist(), float(next_value[0])], config
        )
        returns = (advantages + values).astype(np.float32)
        normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-3)
        return Batch(self.observations, self.actions, log_probs, values, normalised.astype(np.float32), returns)


def generalised_advantages(
    rewards: NDArray[np.float64], ends: NDArray[np.bool_], values: Sequence[float], config: LifeConfig
) -> NDArray[np.float64]:
    """GAE, (n,): A_t = d_t + discount lambda A_{t+1}, d_t = r_t + discount V_{t+1} - V_t, cut where an episode ends.

    Args:
        values: one more than there are rewards.
    """
    advantages, after = np.empty(len(rewards)), 0.0
    for step in range(len(rewards) - 1, -1, -1):
        goes_on = 0.0 if ends[step] else config.discount
        after = float(rewards[step]) + goes_on * values[step + 1] - values[step] + goes_on * config.gae_lambda * after
        advantages[step] = after
    return advantages
