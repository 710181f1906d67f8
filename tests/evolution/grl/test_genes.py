# SPDX-License-Identifier: Apache-2.0
import math
import re
from itertools import pairwise

import gymnasium
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC, TD3
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
    assert left[0] == (
        "1: {'weight': (48, 48), 'bias': (48,)} does not fit mlp_extractor.policy_net.2 with "
        "{'weight': (20, 48), 'bias': (20,)}."
    )
    assert "3: ActorCriticPolicy has no such layer." in left and len(left) == 6
    after = small.state_dict()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert set(after) - same == {"mlp_extractor.policy_net.0.weight"}  # the bias is zero in both


def test_layers_of_any_module():
    policy = nn.Sequential(nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 1))
    assert actor_layers(policy) == {"0": "0", "1.mean": "2"}
    left = inherit_(policy, tensors_of(actor(), (0, 5)), {"0": "0", "5.mean": "2"})
    assert torch.equal(policy[2].weight, actor()["5.mean.weight"]) and [line[:5] for line in left] == ["5.std"]
    with pytest.raises(ValueError, match=re.escape("layers['0']='9' is not a module of Sequential")):
        inherit_(policy, {}, {"0": "9"})
    with pytest.raises(ValueError, match="of Tanh are the actor's cannot be told"):
        actor_layers(nn.Tanh())


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))


@pytest.mark.parametrize("critic", ["critic", "value_net", "vf", "qf1", "q_net", "net2", "other"])
@pytest.mark.parametrize("first", [True, False], ids=["critic first", "actor first"])
def test_no_gene_lands_in_a_critic(critic, first):
    """Whichever is registered first: it is known by its name, and if it is not, two chains are refused."""
    policy = nn.ModuleDict()
    for name in (critic, "net") if first else ("net", critic):
        policy[name] = mlp(3, 48, 48, 1)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    gene = tensors_of(actor(), (0, 1))
    if critic in ("net2", "other"):
        with pytest.raises(ValueError, match=r"ModuleDict are the actor's cannot be told.*'net.0': \(48, 3\)"):
            inherit_(policy, gene)
        assert inherit_(policy, gene, {"0": "net.0", "1": "net.1"}) == []
    else:
        assert inherit_(policy, gene) == []
        with pytest.raises(ValueError, match=re.escape(f"layers['0']='{critic}.0' is part of a critic")):
            inherit_(policy, gene, {"0": f"{critic}.0"})
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert {"net.0.weight", "net.1.weight"} <= changed and all(name.startswith("net.") for name in changed)


@pytest.mark.parametrize("algorithm", [DQN, SAC, TD3])
def test_policies_without_an_actor_of_this_kind_ask_for_names(algorithm):
    environment = gymnasium.make("CartPole-v1" if algorithm is DQN else "Pendulum-v1")
    with pytest.raises(ValueError, match="Policy are the actor's cannot be told.*Name them"):
        inherit_(algorithm("MlpPolicy", environment, buffer_size=10, device="cpu").policy, actor())


@pytest.mark.parametrize("change", ["no bias", "other bias", "no weight"])
def test_a_layer_is_inherited_whole_or_not_at_all(change):
    policy, gene = mlp(3, 48, 48, 1), tensors_of(actor(), (0, 1))
    if change == "no bias":
        policy[1] = nn.Linear(48, 48, bias=False)
    else:
        gene["1.bias"] = torch.ones(20) if change == "other bias" else gene["1.bias"]
        gene = {name: value for name, value in gene.items() if change == "other bias" or name != "1.weight"}
    before = {name: value.clone() for name, value in policy[1].state_dict().items()}
    left = inherit_(policy, gene)
    assert len(left) == 1 and left[0].startswith("1: {'") and torch.equal(policy[0].weight, gene["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in policy[1].state_dict().items())


def test_a_policy_in_which_no_layer_has_a_place_is_refused():
    shapes = r"0: .*'weight': \(48, 3\).* does not fit 0 with .*'weight': \(48, 4\).*1: Sequential has no such layer"
    with pytest.raises(ValueError, match=f"no layer of the gene has a place in Sequential: {shapes}"):
        inherit_(mlp(4, 48, 1), tensors_of(actor(), (0, 1)))
