# SPDX-License-Identifier: Apache-2.0
"""Networks of one shape that live at once: n of them are one network, n times as wide, in n groups.

A convolution with `groups=n`, a batch norm of n times the channels and a linear head in n blocks compute what the n
networks compute, and whatever else a conv net has (ReLU, pool, sum) works channel by channel anyway. So this is
plain PyTorch: running statistics are each network's own, as are the gradients of the summed losses, and one SGD steps
for all. `torch.func.stack_module_state` with `vmap` computes the same; it ends in the same grouped convolution, behind
more machinery, and was slower (`examples/benchmark/gtl_speed.py`).

To the last bit, a convolution may depend on how many groups there are. Therefore networks live in batches of a fixed
size, and processes share whole batches: then the results do not depend on how many processes there are.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .circuit import Fill, inherit_
from .networks import NetworkConfig, create_network, layout_of
from .tasks import ClassImages, Task


__all__ = ["GroupedLinear", "Life", "Population", "accuracy", "centroid_accuracy", "grow", "live"]


class GroupedLinear(nn.Module):
    """n linear layers, of n blocks of channels: (b, n * in) -> (b, n * out).

    Args:
        weight, bias: parameters (n * out, in) and (n * out,), of one layer after the other.
    """

    def __init__(self, groups: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.groups, self.weight, self.bias = groups, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (self.groups, -1)).transpose(0, 1)
        y = blocks @ self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        y = y.transpose(0, 1).flatten(1)
        return y if self.bias is None else y + self.bias


class Population(nn.Module):
    """n networks with these weights, as one; in `network`, every tensor has theirs one after the other.

    Args:
        networks: of one shape, made of convolutions without groups, batch norms, linear layers, and modules without
            parameters that treat each channel alike. Whatever else their modules are set to they are in here, too.

    Raises:
        ValueError: another module with parameters, or networks of different modules.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.size = len(networks)
        if different := [place for place, network in enumerate(networks) if repr(network) != repr(networks[0])]:
            raise ValueError(f"networks {different[:5]} have other modules or settings than the first.")
        self.network = _widen(networks[0], self.size)
        states = [network.state_dict() for network in networks]
        wide = self.network.state_dict()
        for name, tensor in wide.items():
            if tensor.ndim:  # not num_batches_tracked, which is the same for all
                tensor.copy_(torch.cat([state[name] for state in states]))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, b, k) of images (n, b, C, H, W): each network has its own."""
        return self._split(self.network(self._join(images)))

    def features(self, images: Tensor) -> Tensor:
        """As `forward`, what is before the head: of networks that have `features`."""
        return self._split(self.network.features(self._join(images)))  # type: ignore[operator]

    def _join(self, images: Tensor) -> Tensor:
        return images.transpose(0, 1).flatten(1, 2)

    def _split(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(1, (self.size, -1)).transpose(0, 1)

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The state dict of one network, which shares memory with this one."""
        state = self.network.state_dict()
        return {
            name: tensor.unflatten(0, (self.size, -1))[index] if tensor.ndim else tensor
            for name, tensor in state.items()
        }


def _widen(network: nn.Module, n: int) -> nn.Module:
    """The same network with n times the channels, in n groups; its weights are to be filled in."""
    wide = copy.deepcopy(network)
    for name, module in list(wide.named_modules()):
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.in_channels, module.out_channels, module.groups = n * module.in_channels, n * module.out_channels, n
            _repeat_(module, n)
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features *= n
            _repeat_(module, n)
        elif isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(wide.get_submodule(parent), child, _repeat_(GroupedLinear(n, module.weight, module.bias), n))
        elif list(module.parameters(recurse=False)):
            raise ValueError(f"{name} is a {type(module).__name__}, of which no population can be made.")
    return wide


def _repeat_(module: nn.Module, n: int) -> nn.Module:
    """Let a module have all of its tensors n times, one after the other."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        repeated = parameter.data.repeat(n, *[1] * (parameter.ndim - 1))
        module.register_parameter(name, nn.Parameter(repeated, parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim:
            module.register_buffer(name, buffer.repeat(n, *[1] * (buffer.ndim - 1)))
    return module


def grow(
    network: NetworkConfig,
    num_classes: int,
    circuits: Sequence[dict[str, Tensor] | None],
    seeds: Sequence[int],
    *,
    weights: bool = True,
    fill: Fill = "zero",
    device: torch.device | str = "cpu",
) -> Population:
    """New networks that have inherited these circuits; None inherits nothing.

    Args:
        seeds: of the random weights of each.
        weights, fill: see `inherit_`.
    """
    layout, networks = layout_of(network), []
    for circuit, seed in zip(circuits, seeds, strict=True):
        newborn = create_network(network, num_classes, seed=seed)
        if circuit is not None:
            inherit_(newborn.state_dict(), layout, circuit, weights=weights, fill=fill)
        networks.append(newborn)
    return Population(networks).to(device)


@dataclass(frozen=True)
class Life:
    """How a network is trained: SGD, as papers on few-shot learning have it, with a cosine to zero.

    Attributes:
        steps: of the optimiser.
        batch_size: images of each network a step.
        learning_rate, momentum, weight_decay: of SGD.
    """

    steps: int
    batch_size: int = 20
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


def live(
    population: Population,
    images: ClassImages,
    tasks: Sequence[Task],
    life: Life,
    generators: Sequence[torch.Generator],
    *,
    keep_zeros: bool = False,
    watch: Mapping[int, Callable[[int], Any]] | None = None,
    desc: str | None = None,
) -> None:
    """Train every network of a population on its own task, in place.

    Args:
        tasks, generators: of each network; the generator draws its batches, epoch by epoch.
        keep_zeros: kernel weights that are zero before the training are so after it.
        watch: what to call after so many steps, with their number; 0 is before the first.
        desc: of a progress bar.
    """
    parameters = list(population.parameters())
    device = parameters[0].device
    optimizer = torch.optim.SGD(
        parameters, lr=life.learning_rate, momentum=life.momentum, weight_decay=life.weight_decay
    )
    batches = torch.stack(
        [_batches(len(task.train_rows), life, draws) for task, draws in zip(tasks, generators, strict=True)], dim=1
    )
    kept = [(weight, weight != 0) for weight in parameters if weight.ndim == 4] if keep_zeros else []
    watch = watch or {}
    if 0 in watch:
        watch[0](0)
    population.train()
    for step in tqdm(range(life.steps), desc=desc, disable=desc is None, delay=2):
        rows, labels = (
            torch.stack([values[chosen] for values, chosen in zip(column, batches[step], strict=True)])
            for column in ([task.train_rows for task in tasks], [task.train_labels for task in tasks])
        )
        for group in optimizer.param_groups:
            group["lr"] = life.learning_rate * (1 + math.cos(math.pi * step / life.steps)) / 2
        logits = population(images.images(rows, device))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device), reduction="sum") / life.batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in kept:
                weight.mul_(mask)
        if step + 1 in watch:
            watch[step + 1](step + 1)
            population.train()


def _batches(count: int, life: Life, generator: torch.Generator) -> Tensor:
    """(steps, batch): places of a task's training images, every one once an epoch."""
    total = life.steps * life.batch_size
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-total // count))]
    return torch.cat([*epochs, torch.empty(0, dtype=torch.long)])[:total].view(life.steps, life.batch_size)


@torch.no_grad()
def accuracy(population: Population, images: ClassImages, tasks: Sequence[Task]) -> list[float]:
    """Of each network on the validation images of its task, which are as many for all."""
    population.eval()
    right = [
        (population(batch).argmax(2) == labels).sum(1) for batch, labels in _validation(population, images, tasks)
    ]
    return (torch.stack(right).sum(0) / len(tasks[0].validation_rows)).tolist()


@torch.no_grad()
def centroid_accuracy(population: Population, images: ClassImages, tasks: Sequence[Task]) -> list[float]:
    """As `accuracy`, of the nearest centroid: no head and no step, a class is the mean feature of its training images.

    Features are scaled to length one before they are averaged and compared.
    """
    population.eval()
    device = next(population.parameters()).device
    ways = len(tasks[0].classes)
    sums = torch.zeros(())
    for start in range(0, len(tasks[0].train_rows), _EVALUATED):
        stop = start + _EVALUATED
        rows = torch.stack([task.train_rows[start:stop] for task in tasks])
        labels = torch.stack([task.train_labels[start:stop] for task in tasks]).to(device)
        features = F.normalize(population.features(images.images(rows, device)), dim=2)
        sums = sums.to(device) + F.one_hot(labels, ways).float().transpose(1, 2) @ features
    centroids = F.normalize(sums, dim=2)
    right = [
        ((F.normalize(population.features(batch), dim=2) @ centroids.transpose(1, 2)).argmax(2) == labels).sum(1)
        for batch, labels in _validation(population, images, tasks)
    ]
    return (torch.stack(right).sum(0) / len(tasks[0].validation_rows)).tolist()


_EVALUATED = 64  # images of each network at once


def _validation(population: Population, images: ClassImages, tasks: Sequence[Task]):  # type: ignore[no-untyped-def]
    device = next(population.parameters()).device
    for start in range(0, len(tasks[0].validation_rows), _EVALUATED):
        rows = torch.stack([task.validation_rows[start : start + _EVALUATED] for task in tasks])
        labels = torch.stack([task.validation_labels[start : start + _EVALUATED] for task in tasks])
        yield images.images(rows, device), labels.to(device)
