# SPDX-License-Identifier: Apache-2.0
"""What is written out in numpy, against torch."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from diffusers_learngene.evolution.grl.genes import inherit_
from diffusers_learngene.evolution.grl.network import Adam, Batch, LossWeights, Network, actor_shapes
from diffusers_learngene.evolution.grl.policy import ActorCritic


@pytest.fixture
def network():
    """With biases, which fresh ones lack."""
    network, chance = Network(5, 2, seed=3), np.random.default_rng(0)
    network.load_({name: 0.12 * chance.normal(size=shape) for name, shape in actor_shapes(5, 2).items()})
    return network


@pytest.fixture
def batch(network):
    """One in which every branch of the loss occurs."""
    chance = np.random.default_rng(1)
    shapes = {"observations": (64, 5), "actions": (64, 2)}
    parts = [chance.normal(size=shapes.get(part.name, (64,))).astype(np.float32) for part in fields(Batch)]
    batch = Batch(*parts)
    log_probs, values = network.evaluate(batch.observations, batch.actions)
    noise = 0.3 * chance.normal(size=(2, 64)).astype(np.float32)
    return replace(batch, log_probs=log_probs + noise[0], values=values + noise[1])


def in_torch(network):
    """The same network, with the critic."""
    model = ActorCritic(5, 2)
    assert inherit_(model, {name: torch.from_numpy(array) for name, array in network.actor().items()}) == []
    with torch.no_grad():
        for layer, module in enumerate([*model.critic, model.value]):
            weight, bias = network._layers[layer]
            module.weight.copy_(torch.from_numpy(weight[1].T[: module.out_features].copy()))
            module.bias.copy_(torch.from_numpy(bias[1, 0, : module.out_features].copy()))
    return model


def torch_loss(model, batch, weights):
    batch = {part.name: torch.from_numpy(getattr(batch, part.name)) for part in fields(batch)}
    distribution, values = model(batch["observations"])
    ratio = (distribution.log_prob(batch["actions"]).sum(1) - batch["log_probs"]).exp()
    gain = torch.min(
        batch["advantages"] * ratio, batch["advantages"] * ratio.clamp(1 - weights.clip, 1 + weights.clip)
    )
    held = batch["values"] + (values - batch["values"]).clamp(-weights.clip, weights.clip)
    error = torch.max((values - batch["returns"]) ** 2, (held - batch["returns"]) ** 2)
    return (-gain + 0.5 * weights.value * error - weights.entropy * distribution.entropy().sum(1)).mean()


def test_loss_and_gradient_are_torchs(network, batch):
    model, weights = in_torch(network), LossWeights(entropy=0.1)
    loss = torch_loss(model, batch, weights)
    loss.backward()
    assert network.backward_(batch, weights) == pytest.approx(loss.item(), abs=1e-6)
    for layer, (weight, bias) in enumerate(network._gradients):
        last = layer == 5
        actor = [model.mean, model.std] if last else [model.actor[layer]]
        critic = model.value if last else model.critic[layer]
        expected = torch.cat([module.weight.grad for module in actor]).T.numpy()
        assert np.abs(expected).max() > 1e-3 and weight[0] == pytest.approx(expected, abs=1e-6)
        assert bias[0, 0] == pytest.approx(torch.cat([module.bias.grad for module in actor]).numpy(), abs=1e-6)
        outputs = critic.out_features
        assert weight[1, :, :outputs] == pytest.approx(critic.weight.grad.T.numpy(), abs=1e-6)
        assert not weight[1, :, outputs:].any()  # the critic has one output


def test_steps_are_adams_with_clipped_gradients(network, batch):
    model, weights = in_torch(network), LossWeights()
    sides = [
        [*model.actor.parameters(), *model.mean.parameters(), *model.std.parameters()],
        [*model.critic.parameters(), *model.value.parameters()],
    ]
    theirs, ours = torch.optim.Adam([*sides[0], *sides[1]], lr=1e-2), Adam(network, 1e-2, max_norm=0.05)
    for _ in range(3):
        theirs.zero_grad()
        torch_loss(model, batch, weights).backward()
        for side in sides:
            assert torch.nn.utils.clip_grad_norm_(side, 0.05) > 0.05
        theirs.step()
        network.backward_(batch, weights)
        ours.step()
    for name, tensor in in_torch(network).state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=2e-5), name


def test_fresh_layers_are_orthogonal_and_of_their_own():
    network, other = Network(27, 8, seed=0), Network(27, 8, seed=1)
    for layer in range(1, 5):
        weight = network.actor()[f"{layer}.weight"]
        assert weight @ weight.T == pytest.approx(np.eye(48), abs=1e-5)
    assert network.actor()["0.weight"].shape == (48, 27)
    assert all(np.array_equal(a, b) for a, b in zip(network.actor(), Network(27, 8, seed=0).actor(), strict=True))
    assert not np.array_equal(network.actor()["2.weight"], network.actor()["3.weight"])
    assert not np.array_equal(network.actor()["2.weight"], other.actor()["2.weight"])
    assert not np.array_equal(network.actor()["5.mean.weight"], network.actor()["5.std.weight"])
