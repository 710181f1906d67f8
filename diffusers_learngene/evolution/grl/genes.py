# SPDX-License-Identifier: Apache-2.0
"""What a gene is: two of the six layers of an agent's policy network.

Layers 0 to 4 are hidden, layer 5 are the heads, mean and standard deviation, together. So there are C(6, 2) = 15 types
of genes. The size of a gene of type c, by which its score is divided (small genes are favoured), is

    F(c) = sum over its layers of sqrt(n_i)        n_i: the weights of layer i, biases not counted

(Section 3.1 of the paper; numbers as in the authors' code.) Tensors go by names, "<layer>.weight", "<layer>.bias",
"5.mean.weight", ...; in which modules of a network they are, `actor_layers` says.
"""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import combinations, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from .network import DEPTH, HEADS


__all__ = ["GeneType", "actor_layers", "gene_size", "gene_types", "inherit_", "layer_sizes", "overlap", "tensors_of"]

GeneType = tuple[int, ...]
T = TypeVar("T")
# Parts of names that say that a module belongs to a value network.
_CRITIC = re.compile(r"(?:^|[._])(?:critics?|values?|vf|qf|q_net|v_net)\d*(?:[._]|$)", re.IGNORECASE)


def gene_types(layers: int = DEPTH + 1, length: int = 2) -> list[GeneType]:
    """All ways to choose `length` of the layers, in order: (0, 1), (0, 2), ..., (4, 5)."""
    return list(combinations(range(layers), length))


def layer_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, float]:
    """sqrt(n_i) by layer; `shapes` are those of an actor's tensors, by name."""
    numbers: dict[int, int] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            numbers[_layer(name)] = numbers.get(_layer(name), 0) + math.prod(shape)
    return {layer: math.sqrt(number) for layer, number in numbers.items()}


def gene_size(gene_type: Iterable[int], sizes: Mapping[int, float]) -> float:
    """F(c), with `sizes` from `layer_sizes`."""
    return sum(sizes[layer] for layer in gene_type)


def overlap(one: GeneType | None, other: GeneType | None, sizes: Mapping[int, float]) -> float:
    """How much of their layers two genes share: F of those in both over F of those in either; 0 if one is None."""
    if one is None or other is None:
        return 0.0
    return gene_size({*one} & {*other}, sizes) / gene_size({*one} | {*other}, sizes)


def tensors_of(actor: Mapping[str, T], gene_type: Iterable[int]) -> dict[str, T]:
    """Of an actor's tensors, by name, those of the layers of a gene."""
    layers = set(gene_type)
    return {name: tensor for name, tensor in actor.items() if _layer(name) in layers}


def _layer(name: str) -> int:
    return int(name.partition(".")[0])


def actor_layers(policy: nn.Module) -> dict[str, str]:
    """Which module of a policy is which layer of the actor: {"0": "mlp_extractor.policy_net.0", ..., "5.mean": ...}.

    Known are the policies of this package, stable-baselines3's actor-critic policies (of any depth: the last layer is
    the mean), and, of any other module, the `nn.Linear`s outside of what is called a critic, if they are one chain in
    the order in which they are registered: each reads as many numbers as the one before it writes.

    Raises:
        ValueError: which layers are the actor's cannot be told.
    """
    if hasattr(policy, "mlp_extractor") and hasattr(policy, "action_net"):  # stable-baselines3
        hidden = [
            f"mlp_extractor.policy_net.{name}"
            for name, module in policy.mlp_extractor.policy_net.named_children()  # type: ignore[union-attr,operator]
            if isinstance(module, nn.Linear)
        ]
        heads = ["action_net", *(["std_net"] if hasattr(policy, "std_net") else [])]
    elif isinstance(getattr(policy, "actor", None), nn.ModuleList) and hasattr(policy, "mean"):  # `policy.ActorCritic`
        hidden = [f"actor.{index}" for index in range(len(policy.actor))]  # type: ignore[arg-type]
        heads = list(HEADS)
    else:
        chain = {
            name: module
            for name, module in policy.named_modules()
            if isinstance(module, nn.Linear) and not _CRITIC.search(name)
        }
        linear = list(chain.values())
        if not linear or any(one.out_features != two.in_features for one, two in pairwise(linear)):
            shapes = {name: tuple(module.weight.shape) for name, module in chain.items()}
            raise ValueError(
                f"layers=None, but which layers of {type(policy).__name__} are the actor's cannot be told: outside of "
                f"what is called a critic its nn.Linear are {shapes}, which are no chain. Name them: "
                "layers={'0': 'actor.0', ...}."
            )
        hidden, heads = list(chain)[:-1], list(chain)[-1:]
    layers = {str(index): name for index, name in enumerate(hidden)}
    return layers | {f"{len(hidden)}.{head}": name for head, name in zip(HEADS, heads, strict=False)}


@torch.no_grad()
def inherit_(policy: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, str] | None = None) -> list[str]:
    """Copy the layers of a gene into a policy, each with its weights and biases or not at all.

    Args:
        tensors: by name, such as "0.weight" or "5.mean.bias".
        layers: the policy's module for every layer, by name; default: `actor_layers(policy)`.

    Returns:
        A line for each layer that has no place there, with the reason: its module is left as it was.

    Raises:
        ValueError: `layers` names a module that the policy lacks or that is a critic's, or no layer has a place.
    """
    layers = actor_layers(policy) if layers is None else layers
    modules = dict(policy.named_modules())
    for layer, module in layers.items():
        if module not in modules:
            raise ValueError(f"layers[{layer!r}]={module!r} is not a module of {type(policy).__name__}.")
        if _CRITIC.search(module):
            raise ValueError(f"layers[{layer!r}]={module!r} is part of a critic, and a gene is one of an actor.")
    gene: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        gene.setdefault(layer, {})[kind] = value
    left = []
    for layer, values in gene.items():
        if layer not in layers:
            left.append(f"{layer}: {type(policy).__name__} has no such layer.")
            continue
        places = dict(modules[layers[layer]].named_parameters())
        here, there = ({kind: tuple(value.shape) for kind, value in side.items()} for side in (values, places))
        if here != there:
            left.append(f"{layer}: {here} does not fit {layers[layer]} with {there}.")
            continue
        for kind, value in values.items():
            places[kind].copy_(value)
    if gene and len(left) == len(gene):
        raise ValueError(f"no layer of the gene has a place in {type(policy).__name__}: {' '.join(left)}")
    return left
