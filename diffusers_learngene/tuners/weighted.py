# SPDX-License-Identifier: Apache-2.0
"""A weighted sum of adapters, as one adapter: exact, because f(bank, scaler) is linear in the scaler.

    sum_i  weight_i f(bank, scaler_i)    =  f(bank, sum_i  weight_i scaler_i)                     one bank
    sum_i  weight_i f(bank_i, scaler_i)  =  f([bank_1 bank_2 ...], [weight_1 scaler_1, ...])      several

Components stand side by side where banks differ (each kind with its own: KIND's learngenes before its tailors), and
are counted once where they are the same. An adapter that a layer lacks has zeros there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.blocks import Group
from .base_config import LearngeneConfig
from .base_sharing import Bank, share_key
from .scalers import adapted_layers, adapter_config, target_modules


@dataclass
class _Source:
    """A bank of the `number`-th adapter, and which of its rows go where (`Bank.placed`)."""

    number: int
    key: str
    bank: Bank
    rows: set[tuple[int, int, int]] = field(default_factory=set)


@dataclass
class _Block:
    """Components that stand side by side, how many of every kind, and the sources that have just these."""

    tensors: dict[str, Tensor]
    parts: tuple[int, ...]
    sources: list[_Source]


class WeightedSum:
    """The weighted sum of some adapters of a model, to be made into a new one.

    Args:
        model: with the adapters; no PeftModel, but what is in it.
        adapters: names; one may come twice.
        weights: as many numbers.

    Raises:
        ValueError: unknown adapters, no or other than finite weights, modes or methods that differ, adapters that have
            more than a bank and scalers, or banks that cannot stand side by side.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> None:
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"adapters={adapters!r} and weights={weights!r} must be names and as many finite numbers."
            )
        configs = [adapter_config(model, name) for name in adapters]
        self.adapters, self.weights = list(adapters), list(weights)
        self.layers = [adapted_layers(model, name) for name in adapters]
        self._check(configs)
        some_layer = next(iter(self.layers[0].values()))
        self.bank_scope, self.scaler_scope = some_layer.bank_scope, some_layer.scaler_scope
        names = list(dict.fromkeys(name for layers in self.layers for name in layers))
        order = [name for name, _ in model.named_modules() if name in set(names)]
        self.groups = Anatomy.of(model).groups_of(order, configs[0].share_qkv)
        self.blocks: dict[str, list[_Block]] = {}
        pattern = {group.key: self._add_blocks(group) for group in self.groups}
        self.config: LearngeneConfig = replace(
            configs[0],
            target_modules=target_modules(model, names),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            **{configs[0].pattern_name: pattern},
        )
        self.config.check_groups(self.groups)

    def _check(self, configs: Sequence[Any]) -> None:
        if len({(type(config), config.mode) for config in configs}) > 1:
            kinds = [f'{type(config).__name__}(mode="{config.mode}")' for config in configs]
            raise ValueError(f"Only adapters of one method and mode add up, but {self.adapters} are {kinds}.")
        for name, config in zip(self.adapters, configs, strict=True):
            configs[0].check_addable(config)
            if config.bias != "none" or config.modules_to_save or config.tensors_to_save:
                raise ValueError(
                    f"Adapter {name!r} has trained bias, modules_to_save or tensors_to_save, which belong to one "
                    "adapter."
                )
        for name, layers in zip(self.adapters, self.layers, strict=True):
            scales: dict[int, float] = {}
            for layer in layers.values():
                if scales.setdefault(id(layer.scaler(name)), layer.scaling[name]) != layer.scaling[name]:
                    raise ValueError(f"Layers of adapter {name!r} that share a scaler are scaled differently.")
        if configs[0].mode == "generate" and any(layers.keys() != self.layers[0].keys() for layers in self.layers):
            raise ValueError(f"Of {self.adapters}, not all generate the same layers, so nothing adds up in some.")

    def _add_blocks(self, group: Group) -> Any:
        """Find the blocks of the group's new banks; returns the group's entry in the config's pattern."""
        found: dict[str, dict[tuple[int, str], _Source]] = {}
        for number, adapter in enumerate(self.adapters):
            for matrix, offset in zip(group.matrices, group.offsets, strict=True):
                if layer := self.layers[number].get(matrix.name):
                    sources = found.setdefault(share_key(self.bank_scope, group, matrix), {})
                    key = layer.bank_keys[adapter]
                    source = sources.setdefault((number, key), _Source(number, key, layer.bank(adapter)))
                    source.rows.add((layer.offsets[adapter], offset, matrix.shape[0]))
        total = sum(m1 for m1, _ in group.shapes)
        banks = [source.bank for sources in found.values() for source in sources.values()]
        one = [1] * len(banks[0].parts)
        if any(bank.pattern(*one) != banks[0].pattern(*one) for bank in banks):
            raise ValueError(f"The banks of {self.adapters} for {group.key} have components of different sizes.")
        for key, sources in found.items():
            blocks = self.blocks[key] = []
            for source in sources.values():
                tensors = source.bank.placed(sorted(source.rows), total)
                parts = source.bank.parts
                twin = next(
                    (block for block in blocks if block.parts == parts and _equal(block.tensors, tensors)), None
                )
                if twin is None:
                    blocks.append(_Block(tensors, parts, [source]))
                else:
                    twin.sources.append(source)
        totals = ([sum(kind) for kind in zip(*(b.parts for b in self.blocks[key]), strict=True)] for key in found)
        return banks[0].pattern(*(max(kind) for kind in zip(*totals, strict=True)))

    @torch.no_grad()
    def fill_(self, model: nn.Module, adapter_name: str) -> None:
        """Write the sum into the adapter that was made from `config`."""
        layers = adapted_layers(model, adapter_name)
        for group in self.groups:
            for matrix in group.matrices:
                layer = layers[matrix.name]
                blocks = self.blocks[share_key(self.bank_scope, group, matrix)]
                places = _places(blocks, layer.bank(adapter_name).parts)
                if adapter_name in layer.banks:
                    axis = layer.bank(adapter_name).component_axis
                    for name, parameter in layer.bank(adapter_name).named_parameters():
                        parameter.zero_()
                        for block, here, there in places:
                            piece = block.tensors[name].to(parameter).narrow(axis, *here)
                            parameter.narrow(axis, *there).copy_(piece)
                if adapter_name in layer.scalers:
                    key = share_key(self.scaler_scope, group, matrix)
                    users = [m.name for m in group.matrices if share_key(self.scaler_scope, group, m) == key]
                    scaler = layer.scaler(adapter_name).weight.zero_()
                    for block, here, there in places:
                        for source in block.sources:
                            self._add_scaler(scaler.narrow(0, *there), here, source, users)

    def _add_scaler(self, part: Tensor, here: tuple[int, int], source: _Source, users: Sequence[str]) -> None:
        """Add some components that a source has for a matrix, or for one layer's, to a part of the new scaler."""
        adapter, layers = self.adapters[source.number], self.layers[source.number]
        found = [layers[name] for name in users if name in layers]
        layer = next((layer for layer in found if layer.bank_keys[adapter] == source.key), None)
        if layer is not None:
            scaler = layer.scaler(adapter).weight.narrow(0, *here).to(part)
            part += self.weights[source.number] * layer.scaling[adapter] * scaler


def _places(blocks: Sequence[_Block], totals: Sequence[int]) -> list[tuple[_Block, tuple[int, int], tuple[int, int]]]:
    """Which components of every block go where, as (start, length) here and there, kind by kind."""
    places, start = [], 0
    for kind, total in enumerate(totals):
        there = start
        for block in blocks:
            count = block.parts[kind]
            places.append((block, (sum(block.parts[:kind]), count), (there, count)))
            there += count
        start += total
    return places


def _equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name].to(tensor)) for name, tensor in tensors.items())
