# SPDX-License-Identifier: Apache-2.0
"""The paper's actor and critic, and the gradient of PPO's loss, in numpy.

    actor     observation - 48 - 48 - 48 - 48 - 48, tanh;  mean = linear, standard deviation = sigmoid(linear)
    critic    the same with one output

These matrices are so small that torch spends most of a step in finding out what to do
(`examples/benchmark/grl_speed.py`). So a life is lived in numpy, with the few derivatives written out, and `policy.py`
has the same network for torch; that both agree is tested. Actor and critic lie beside each other in one array, so that
one call multiplies both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...runs.sampler import seeded_generator


__all__ = ["DEPTH", "HEADS", "WIDTH", "Actor", "Adam", "Batch", "LossWeights", "Network", "actor_shapes"]

WIDTH, DEPTH = 48, 5
HEADS = ("mean", "std")  # both are layer 5, the sixth
_FLOAT = np.float32
_LOG_2PI = math.log(2 * math.pi)

Array = NDArray[np.float32]
Actor = dict[str, Array]  # of layers 0 to 4 "<layer>.weight" (out, in) and ".bias" (out,), then "5.mean.weight", ...


@dataclass(frozen=True)
class Batch:
    """Some steps of a rollout, (n, ...) each: what was seen and done, how probable that was, and how it went."""

    observations: Array
    actions: Array
    log_probs: Array
    values: Array
    advantages: Array
    returns: Array


@dataclass(frozen=True)
class LossWeights:
    """PPO's constants; the value loss is halved once more, as in the authors' code."""

    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5


def actor_shapes(observation_size: int, action_size: int) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of the tensors of an `Actor`, as torch lays them out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(DEPTH):
        shapes[f"{layer}.weight"], shapes[f"{layer}.bias"] = (WIDTH, WIDTH if layer else observation_size), (WIDTH,)
    for head in HEADS:
        shapes[f"{DEPTH}.{head}.weight"], shapes[f"{DEPTH}.{head}.bias"] = (action_size, WIDTH), (action_size,)
    return shapes


class Network:
    """An actor and a critic with fresh weights: orthogonal of gain 1, biases 0.

    `parameters` is (2, size), the actor's row first; `gradient` is like it. The critic has as many outputs as the
    actor, of which the first counts and the others stay zero.

    Args:
        seed: of the fresh weights; each layer has its own random numbers.
    """

    def __init__(self, observation_size: int, action_size: int, *, seed: int) -> None:
        self.action_size = action_size
        self._widths = [observation_size, *[WIDTH] * DEPTH, 2 * action_size]
        size = sum((before + 1) * after for before, after in zip(self._widths, self._widths[1:], strict=False))
        self.parameters = np.zeros((2, size), _FLOAT)
        self.gradient = np.zeros_like(self.parameters)
        self._layers, self._gradients = self._views(self.parameters), self._views(self.gradient)
        self._actor = [(weight[0], bias[0, 0]) for weight, bias in self._layers]
        for layer, (weight, _) in enumerate(self._layers[:-1]):
            for side in (0, 1):
                weight[side] = _orthogonal(weight[side].T.shape, seed, side, layer).T
        head = self._layers[-1][0]
        for place in range(len(HEADS)):
            columns = np.s_[place * action_size : (place + 1) * action_size]
            head[0, :, columns] = _orthogonal((action_size, WIDTH), seed, 0, DEPTH + place).T
        head[1, :, :1] = _orthogonal((1, WIDTH), seed, 1, DEPTH).T

    def _views(self, buffer: Array) -> list[tuple[Array, Array]]:
        """Of every layer the weights (2, in, out) and biases (2, 1, out) in a buffer (2, size)."""
        views, start = [], 0
        for before, after in zip(self._widths, self._widths[1:], strict=False):
            middle, end = start + before * after, start + (before + 1) * after
            views.append((buffer[:, start:middle].reshape(2, before, after), buffer[:, None, middle:end]))
            start = end
        return views

    def actor(self) -> Actor:
        """A copy of the actor."""
        return {name: np.array(view) for name, view in self._named().items()}

    def load_(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite these tensors of the actor, and no other."""
        named = self._named()
        for name, value in tensors.items():
            named[name][...] = value

    def _named(self) -> Actor:
        named: Actor = {}
        for layer, (weight, bias) in enumerate(self._actor[:-1]):
            named[f"{layer}.weight"], named[f"{layer}.bias"] = weight.T, bias
        weight, bias = self._actor[-1]
        for place, head in enumerate(HEADS):
            columns = np.s_[place * self.action_size : (place + 1) * self.action_size]
            named[f"{DEPTH}.{head}.weight"], named[f"{DEPTH}.{head}.bias"] = weight[:, columns].T, bias[columns]
        return named

    def act(self, observation: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, (actions,) each, of one observation."""
        hidden = observation
        for weight, bias in self._actor[:-1]:
            hidden = hidden.dot(weight)
            hidden += bias
            np.tanh(hidden, hidden)
        weight, bias = self._actor[-1]
        outputs = hidden.dot(weight)
        outputs += bias
        return outputs[: self.action_size], _sigmoid(outputs[self.action_size :])

    def evaluate(self, observations: Array, actions: Array) -> tuple[Array, Array]:
        """Log-probabilities and values, (n,) each, of observations (n, ...) and actions (n, ...)."""
        outputs = self._forward(observations)[-1]
        mean, std = outputs[0, :, : self.action_size], _sigmoid(outputs[0, :, self.action_size :])
        return _log_prob((actions - mean) / std, np.log(std)), outputs[1, :, 0].copy()

    def _forward(self, observations: Array) -> list[Array]:
        """Inputs of all layers, then the outputs (2, n, 2 x actions)."""
        hidden = [observations]  # (n, in), then (2, n, width)
        for weight, bias in self._layers:
            outputs = np.matmul(hidden[-1], weight)
            outputs += bias
            if len(hidden) <= DEPTH:
                np.tanh(outputs, out=outputs)
            hidden.append(outputs)
        return hidden

    def backward_(self, batch: Batch, weights: LossWeights) -> float:
        """Put the gradient of PPO's clipped loss on a batch into `gradient`; the loss.

        L = mean[ -min(A ratio, A clip(ratio)) + value/2 max((V - R)^2, (V_clipped - R)^2) - entropy H ]
        """
        hidden = self._forward(batch.observations)
        outputs, count, n = hidden[-1], len(batch.actions), self.action_size
        std = _sigmoid(outputs[0, :, n:])
        score = (batch.actions - outputs[0, :, :n]) / std
        log_std = np.log(std)
        ratio = np.exp(_log_prob(score, log_std) - batch.log_probs)
        clipped = np.clip(ratio, 1 - weights.clip, 1 + weights.clip)
        gain, held = batch.advantages * ratio, batch.advantages * clipped
        value = outputs[1, :, 0]
        moved = value - batch.values
        error = value - batch.returns
        error_held = batch.values + np.clip(moved, -weights.clip, weights.clip) - batch.returns
        farther = np.square(error) >= np.square(error_held)
        entropy = log_std.sum(1) + 0.5 * n * (1 + _LOG_2PI)
        worst = np.where(farther, error, error_held)
        losses = -np.minimum(gain, held) + 0.5 * weights.value * np.square(worst) - weights.entropy * entropy

        down = np.zeros_like(outputs)
        by_log_prob = np.where(gain <= held, gain, 0)[:, None] / -count  # where the held one is less, it is constant
        down[0, :, :n] = by_log_prob * score / std
        down[0, :, n:] = (by_log_prob * (np.square(score) - 1) - weights.entropy / count) * (1 - std)
        passes = farther | (np.abs(moved) < weights.clip)
        down[1, :, 0] = weights.value / count * worst * passes
        for layer in range(DEPTH, -1, -1):
            inputs, (by_weight, by_bias) = hidden[layer], self._gradients[layer]
            np.matmul(np.swapaxes(inputs, -1, -2), down, out=by_weight)
            np.sum(down, axis=1, keepdims=True, out=by_bias)
            if layer:
                down = np.matmul(down, np.swapaxes(self._layers[layer][0], 1, 2))
                down *= 1 - np.square(inputs)
        return float(losses.mean())


class Adam:
    """Adam as torch has it, for a `Network`; the gradients of actor and critic are each scaled to a norm of at most
    `max_norm` before."""

    def __init__(self, network: Network, learning_rate: float, max_norm: float) -> None:
        self.network, self.learning_rate, self.max_norm = network, learning_rate, max_norm
        self._first, self._second = np.zeros_like(network.parameters), np.zeros_like(network.parameters)
        self._buffer = np.empty_like(network.parameters)
        self._step = 0

    def step(self) -> None:
        gradient, buffer = self.network.gradient, self._buffer
        norms = np.sqrt(np.einsum("ij,ij->i", gradient, gradient))
        gradient *= np.minimum(1, self.max_norm / (norms + 1e-6)).astype(_FLOAT)[:, None]
        self._step += 1
        self._first *= 0.9
        np.multiply(gradient, 0.1, out=buffer)
        self._first += buffer
        self._second *= 0.999
        np.multiply(gradient, gradient, out=buffer)
        buffer *= 0.001
        self._second += buffer
        np.sqrt(self._second, out=buffer)
        buffer /= math.sqrt(1 - 0.999**self._step)
        buffer += 1e-8
        np.divide(self._first, buffer, out=buffer)
        buffer *= self.learning_rate / (1 - 0.9**self._step)
        self.network.parameters -= buffer


def _orthogonal(shape: tuple[int, ...], *seeds: int) -> Array:
    return nn.init.orthogonal_(torch.empty(shape), generator=seeded_generator(*seeds)).numpy()


def _sigmoid(values: Array) -> Array:
    exponential: Array = np.exp(-values)
    return np.reciprocal(exponential + _FLOAT(1))


def _log_prob(score: Array, log_std: Array) -> Array:
    return -(0.5 * np.square(score) + log_std).sum(1) - 0.5 * score.shape[1] * _LOG_2PI
