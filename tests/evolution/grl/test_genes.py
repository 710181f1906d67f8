# SPDX-License-Identifier: Apache-2.0
import math
import re

import gymnasium
import pytest
import torch
from stable_baselines3 import PPO
from torch import nn

from diffusers_learngene.evolution.grl.genes import (
    actor_layers,
    gene_size,
    gene_types,
    inherit_,
    layer_sizes,
    overlap,
    tensors_of,
)
from diffusers_learngene.evolution.grl.network import Network, actor_shapes
from diffusers_learngene.evolution.grl.policy import ActorCritic, LearngenePolicy


ANT_SIZES = layer_sizes(actor_shapes(27, 8))


def actor(seed=0):
    return {name: torch.from_numpy(array) for name, array in Network(3, 1, seed=seed).actor().items()}


def sb3(policy=LearngenePolicy, **kwargs):
    return PPO(policy, gymnasium.make("Pendulum-v1"), policy_kwargs=kwargs, device="cpu").policy


def test_there_are_15_types():
    assert len(gene_types()) == 15 and gene_types()[0] == (0, 1) and gene_types()[-1] == (4, 5)


def test_sizes_are_the_papers():
    assert [round(size, 2) for size in ANT_SIZES.values()] == [36.0, 48, 48, 48, 48, 27.71]
    assert gene_size((0, 5), ANT_SIZES) == pytest.approx(36 + math.sqrt(2 * 48 * 8))
    assert sum(math.prod(shape) for shape in actor_shapes(27, 8).values()) == 11_536


def test_overlap():
    assert overlap((0, 5), (0, 5), ANT_SIZES) == 1 and overlap((0, 5), (1, 2), ANT_SIZES) == 0
    assert overlap((0, 1), (1, 2), ANT_SIZES) == pytest.approx(48 / (36 + 48 + 48))
    assert overlap((0, 1), None, ANT_SIZES) == overlap(None, None, ANT_SIZES) == 0


@pytest.mark.parametrize("gene_type", [(0, 5), (1, 3)])
@pytest.mark.parametrize("policy", ["torch", "sb3"])
def test_inheriting_copies_these_layers_and_nothing_else(policy, gene_type):
    torch.manual_seed(0)
    policy = ActorCritic(3, 1) if policy == "torch" else sb3()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    gene = tensors_of(actor(), gene_type)
    assert inherit_(policy, gene) == []
    layers, after = actor_layers(policy), policy.state_dict()
    assert list(layers) == ["0", "1", "2", "3", "4", "5.mean", "5.std"]
    places = {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in gene.items()}
    assert len(places) == (6 if 5 in gene_type else 4)
    for name, value in after.items():
        assert torch.equal(value, places.get(name, before[name]))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in places if name.endswith("weight")} <= changed <= set(places)


def test_the_networks_of_numpy_torch_and_stable_baselines_agree():
    whole, observations = actor(), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    network, ours, theirs = Network(3, 1, seed=0), ActorCritic(3, 1), sb3()
    assert inherit_(ours, whole) == inherit_(theirs, whole) == []
    with torch.no_grad():
        distribution, _ = ours(observations)
        other = theirs.get_distribution(observations).distribution
    for index, observation in enumerate(observations.numpy()):
        mean, std = network.act(observation)
        for expected in (distribution, other):
            assert mean == pytest.approx(expected.mean[index].numpy(), abs=1e-6)
            assert std == pytest.approx(expected.stddev[index].numpy(), abs=1e-6)


def test_a_stable_baselines_policy_with_a_gene_learns():
    model = PPO(LearngenePolicy, gymnasium.make("Pendulum-v1"), n_steps=64, device="cpu")
    inherit_(model.policy, tensors_of(actor(), (0, 5)))
    before = model.policy.std_net.weight.detach().clone()
    model.learn(64)
    assert not torch.equal(before, model.policy.std_net.weight)


def test_what_does_not_fit_is_left_and_listed():
    small = sb3("MlpPolicy", net_arch=[48, 20])  # two hidden layers, no head for the deviation
    before = {name: value.clone() for name, value in small.state_dict().items()}
    left = inherit_(small, actor())
    assert left[:1] == ["1.weight: (48, 48) does not fit (20, 48) of mlp_extractor.policy_net.2."]
    assert "3.weight: ActorCriticPolicy has no such layer." in left and len(left) == 12
    after = small.state_dict()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert set(after) - same == {"mlp_extractor.policy_net.0.weight"}  # the bias is zero in both


def test_layers_of_any_module():
    policy = nn.Sequential(nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 1))
    assert actor_layers(policy) == {"0": "0", "1.mean": "2"}
    left = inherit_(policy, tensors_of(actor(), (0, 5)), {"0": "0", "5.mean": "2"})
    assert torch.equal(policy[2].weight, actor()["5.mean.weight"]) and [line[:5] for line in left] == ["5.std"] * 2
    with pytest.raises(ValueError, match=re.escape("layers['0']='9' is not a module of Sequential")):
        inherit_(policy, {}, {"0": "9"})
    with pytest.raises(ValueError, match="Tanh has no nn.Linear"):
        actor_layers(nn.Tanh())
