# SPDX-License-Identifier: Apache-2.0
"""GTL's learngene, a circuit of channels: pure functions of state dicts.

A network has convolutions l with weights W_l (out, in, k, k) and batch norms BN_l. A circuit is a set of channels S_l
of every layer, with the weights among them and nothing else:

    G = { W_l[S_l, S_(l-1)],  BN_l[S_l] }          S_0 = all channels of the image

Each layer reads only what the one before it writes, so G is itself a narrow network that runs from the image to the
last features. A descendant has it in the first |S_l| channels P_l of its layers:

    W'_l[P_l, P_(l-1)] = W_l[S_l, S_(l-1)]     W'_l[P_l, others] = 0     BN'_l[P_l] = BN_l[S_l]     the rest is random

The zeros keep out the random channels, which may read from the circuit: before any training it computes in the
descendant what it computes by itself. All weights of a descendant are trained.

(Feng et al., "Transferring Core Knowledge via Learngenes", 2024. Their circuit is "a subset of channels" of about 20%
of the parameters with zeros in place of what is missing. How large each set is, they do not say: here a share r of
every layer, and as W_l has r x r of its numbers left, r = sqrt(20%).)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .networks import INPUT, NORM_ENTRIES, Kernel


__all__ = [
    "Fill",
    "IndexSets",
    "circuit_shapes",
    "circuit_sizes",
    "extract",
    "first_sets",
    "inherit_",
    "largest_sets",
    "mutate",
    "overlap",
    "parameters",
    "random_sets",
    "set_sizes",
]

IndexSets = dict[str, Tensor]  # by name, sorted indices of channels
Fill = Literal["zero", "random"]


def set_sizes(widths: Mapping[str, int], budget: float) -> dict[str, int]:
    """How many channels of each index set a circuit with about this share of the parameters has: sqrt(budget) of
    them, at least one.

    Raises:
        ValueError: a budget that is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} must lie in (0, 1].")
    share = math.sqrt(budget)
    return {name: max(1, round(share * width)) for name, width in widths.items() if name != INPUT}


def random_sets(widths: Mapping[str, int], sizes: Mapping[str, int], generator: torch.Generator) -> IndexSets:
    """Channels drawn without replacement."""
    return {
        name: torch.randperm(widths[name], generator=generator)[:size].sort().values for name, size in sizes.items()
    }


def first_sets(sizes: Mapping[str, int]) -> IndexSets:
    """Where a descendant has the circuit that it inherited."""
    return {name: torch.arange(size) for name, size in sizes.items()}


def largest_sets(state: Mapping[str, Tensor], layout: Sequence[Kernel], sizes: Mapping[str, int]) -> IndexSets:
    """The channels whose kernels have the largest L1 norm, those that are added being added: magnitude pruning."""
    size: dict[str, Tensor] = {}
    for kernel in layout:
        norm = state[f"{kernel.conv}.weight"].abs().sum((1, 2, 3)).cpu()
        size[kernel.writes] = size.get(kernel.writes, 0) + norm
    return {name: size[name].argsort(descending=True)[:count].sort().values for name, count in sizes.items()}


def extract(state: Mapping[str, Tensor], layout: Sequence[Kernel], sets: IndexSets) -> dict[str, Tensor]:
    """The circuit in these channels of a network, under the names that its state dict has."""
    circuit = {}
    for kernel in layout:
        weight = state[f"{kernel.conv}.weight"]
        rows = sets[kernel.writes].to(weight.device)
        kept = weight[rows]
        if kernel.reads != INPUT:
            kept = kept[:, sets[kernel.reads].to(weight.device)]
        circuit[f"{kernel.conv}.weight"] = kept
        if f"{kernel.conv}.bias" in state:
            circuit[f"{kernel.conv}.bias"] = state[f"{kernel.conv}.bias"][rows]
        for name in [f"{kernel.norm}.{entry}" for entry in NORM_ENTRIES if kernel.norm]:
            circuit[name] = state[name][rows]
    return circuit


@torch.no_grad()
def inherit_(
    state: Mapping[str, Tensor],
    layout: Sequence[Kernel],
    circuit: Mapping[str, Tensor],
    *,
    weights: bool = True,
    fill: Fill = "zero",
) -> None:
    """Write a circuit into the first channels of a network, in place; where only the network has a bias it becomes 0.

    Args:
        state: of the network; `network.state_dict()` shares its memory.
        weights: False passes on the structure alone ("Darwinian"): the zeros are written, and no weight is.
        fill: of the weights by which the circuit would read other channels; "random" leaves them as they are.

    Raises:
        ValueError: a circuit that does not fit in; nothing has been written then.
    """
    if lacks := circuit.keys() - state.keys():
        raise ValueError(
            f"the network has no {sorted(lacks)[:5]}, which the circuit holds: give its modules the same."
        )
    for kernel in layout:
        name = f"{kernel.conv}.weight"
        there, here = circuit[name].shape, state[name].shape
        whole = there[1] == here[1] if kernel.reads == INPUT else there[1] <= here[1]
        if there[0] > here[0] or not whole or there[2:] != here[2:]:
            raise ValueError(
                f"{name} of the circuit is {tuple(there)} and does not fit into {tuple(here)} of the network: make it "
                "wider, of the same image channels and kernel size."
            )
    for kernel in layout:
        name = f"{kernel.conv}.weight"
        rows, columns = circuit[name].shape[:2]
        if fill == "zero":
            state[name][:rows, columns:] = 0
        if weights:
            state[name][:rows, :columns] = circuit[name]
            if (name := f"{kernel.conv}.bias") in state:
                state[name][:rows] = circuit.get(name, 0)
            for name in [f"{kernel.norm}.{entry}" for entry in NORM_ENTRIES if kernel.norm]:
                state[name][:rows] = circuit[name]


def mutate(
    sets: IndexSets,
    widths: Mapping[str, int],
    generator: torch.Generator,
    *,
    probability: float = 0.1,
    rate: float = 0.1,
) -> tuple[IndexSets, int]:
    """Swap some channels for others of the same host, which come with the weights that they learned there.

    With `probability`, max(1, rate x |S|) random members of a set go, and as many that were not in it come. Sizes
    stay, and so does the budget.

    Args:
        widths: of the host.
        rate: at most as many are swapped as there are others.

    Returns:
        The new sets, and how many channels were swapped.
    """
    mutated, swapped = {}, 0
    for name, members in sets.items():
        outside = torch.ones(widths[name], dtype=torch.bool)
        outside[members] = False
        others = outside.nonzero()[:, 0]
        count = min(max(1, round(rate * len(members))), len(others))
        chance = torch.rand((), generator=generator).item()
        stay = torch.randperm(len(members), generator=generator)[count:]
        come = torch.randperm(len(others), generator=generator)[:count]
        if chance < probability:
            members = torch.cat([members[stay], others[come]]).sort().values
            swapped += count
        mutated[name] = members
    return mutated, swapped


def overlap(one: IndexSets, other: IndexSets) -> float:
    """|intersection| / |union| of the channels of two circuits of one host, from 0 to 1."""
    common = sum(int(torch.isin(one[name], other[name]).sum()) for name in one)
    return common / (sum(len(one[name]) + len(other[name]) for name in one) - common)


def circuit_sizes(circuit: Mapping[str, Tensor], layout: Sequence[Kernel]) -> dict[str, int]:
    """By index set, how many channels a circuit has of it."""
    return {kernel.writes: len(circuit[f"{kernel.conv}.weight"]) for kernel in layout}


def circuit_shapes(
    state: Mapping[str, Tensor], layout: Sequence[Kernel], sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of the tensors of a circuit with these sizes."""
    return {name: tuple(tensor.shape) for name, tensor in extract(state, layout, first_sets(sizes)).items()}


def parameters(state: Mapping[str, Tensor]) -> int:
    """How many parameters a circuit has, or the convolutions and norms of a network; running statistics are none."""
    return sum(tensor.numel() for name, tensor in state.items() if name.rpartition(".")[2] in ("weight", "bias"))
