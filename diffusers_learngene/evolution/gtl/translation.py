# SPDX-License-Identifier: Apache-2.0
"""A circuit of one built-in network in the words of another: other depths, and VGG <-> ResNet.

Widths need no translation (`circuit.inherit_`). Stages answer to stages. What a stage has beyond the circuit's layers
are identities: Dirac kernels under a norm that changes nothing, which carry the circuit's outputs on because no output
of a ReLU is negative. What it has no room for is lost: the last layers of the stage. Between the architectures

    VGG -> ResNet    the three convolutions of a block take three layers; the norm of the shortcut has the scale 0
    ResNet -> VGG    three layers take a block: two of them carry its input along (of the image: both signs), and the
                     third computes the sum, with the norms folded into its weights. Where a stage has fewer layers
                     than that, they take the block's first convolutions, and the sum is lost.

The result is exact, in eval mode and to rounding, if nothing is lost and there are as many stages, as each has a pool.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .networks import NORM_ENTRIES, Kernel, NetworkConfig, layout_of


__all__ = ["translate"]

_Layer = dict[str, Tensor]  # "kernel", and the NORM_ENTRIES of the norm behind it
_EPS = 1e-5  # of the norms of the built-in networks


def translate(
    circuit: Mapping[str, Tensor], source: NetworkConfig, target: NetworkConfig
) -> tuple[dict[str, Tensor], bool]:
    """A circuit of `source` as one of `target`, and whether it is exact there.

    Args:
        circuit: as `circuit.extract` gives it.
        target: its widths are of no account.
    """
    channels, exact = source.image_channels, len(source.depths) == len(target.depths)
    translated: list[_Layer] = []
    for stage, depth in enumerate(target.depths):
        own = [_read(circuit, kernel) for kernel in layout_of(source) if kernel.writes.startswith(f"{stage}.")]
        blocks = [own[start : start + 4] for start in range(0, len(own), 4)]
        match source.architecture, target.architecture:
            case "vgg", "vgg":
                exact &= len(own) <= depth
                layers = _chain(own, depth, channels)
            case "vgg", "resnet":
                exact &= len(own) <= 3 * depth
                layers = _with_shortcuts(_chain(own, 3 * depth, channels), channels)
            case "resnet", "resnet":
                exact &= len(blocks) <= depth
                layers = _blocks(blocks, depth, channels)
            case _:
                room = 3 * len(blocks) <= depth
                exact &= room
                chain = _unrolled(blocks, channels, image=stage == 0) if room else _main_path(blocks)
                layers = _chain(chain, depth, channels)
        translated += layers
        channels = len(layers[-1]["kernel"])
    named: dict[str, Tensor] = {}
    for kernel, layer in zip(layout_of(target), translated, strict=True):
        named[f"{kernel.conv}.weight"] = layer["kernel"]
        named |= {f"{kernel.norm}.{entry}": layer[entry] for entry in NORM_ENTRIES}
    return named, exact


def _read(circuit: Mapping[str, Tensor], kernel: Kernel) -> _Layer:
    norm = {entry: circuit[f"{kernel.norm}.{entry}"] for entry in NORM_ENTRIES}
    return {"kernel": circuit[f"{kernel.conv}.weight"], **norm}


def _chain(layers: list[_Layer], depth: int, channels: int) -> list[_Layer]:
    """The first `depth` of the layers, each fitted to the one before it, and identities after them."""
    chain = []
    for place in range(depth):
        chain.append(_reading(layers[place], channels) if place < len(layers) else _identity(channels, 3))
        channels = len(chain[-1]["kernel"])
    return chain


def _blocks(blocks: list[list[_Layer]], depth: int, channels: int) -> list[_Layer]:
    """The first `depth` blocks, and after them such as pass their input through the shortcut."""
    layers = []
    for place in range(depth):
        if place < len(blocks):
            one, two, three, shortcut = blocks[place]
            layers += [_reading(one, channels), two, three, _reading(shortcut, channels)]
        else:
            identity = _identity(channels, 3)
            layers += [identity, identity, _silent(identity), _identity(channels, 1)]
        channels = len(layers[-1]["kernel"])
    return layers


def _with_shortcuts(layers: list[_Layer], channels: int) -> list[_Layer]:
    """Blocks of three layers of a chain and a shortcut that adds nothing."""
    blocks = []
    for start in range(0, len(layers), 3):
        *_, last = three = layers[start : start + 3]
        rows = len(last["kernel"])
        blocks += [*three, _silent({**_identity(rows, 1), "kernel": torch.eye(rows, channels)[:, :, None, None]})]
        channels = rows
    return blocks


def _main_path(blocks: list[list[_Layer]]) -> list[_Layer]:
    return [layer for block in blocks for layer in block[:3]]


def _unrolled(blocks: list[list[_Layer]], channels: int, *, image: bool) -> list[_Layer]:
    """Three layers a block, of which the first two carry its input along and the third adds the shortcut."""
    layers = []
    for place, (one, two, three, shortcut) in enumerate(blocks):
        signs = [1.0, -1.0] if image and place == 0 else [1.0]  # x = relu(x) - relu(-x)
        carry = torch.cat([sign * _identity(channels, 3)["kernel"] for sign in signs])
        carried = len(carry)
        along = _identity(carried, 3)
        one = _reading(one, channels)
        first = {"kernel": torch.cat([one["kernel"], carry])}
        second = {"kernel": torch.block_diag(*(layer["kernel"].flatten(1) for layer in (two, along)))}
        second["kernel"] = second["kernel"].unflatten(1, (-1, 3, 3))
        for new, layer in ((first, one), (second, two)):
            new |= {entry: torch.cat([layer[entry], along[entry]]) for entry in NORM_ENTRIES}
        (main, main_bias), (side, side_bias) = _folded(three), _folded(_reading(shortcut, channels))
        side = torch.nn.functional.pad(torch.cat([sign * side for sign in signs], 1), (1, 1, 1, 1))
        third = {**_identity(len(main), 3), "kernel": torch.cat([main, side], 1), "bias": main_bias + side_bias}
        layers += [first, second, third]
        channels = len(main)
    return layers


def _identity(channels: int, size: int) -> _Layer:
    """What changes nothing that is not negative."""
    kernel = torch.nn.init.dirac_(torch.empty(channels, channels, size, size))
    one, zero = torch.ones(channels), torch.zeros(channels)
    return {"kernel": kernel, "weight": one, "bias": zero, "running_mean": zero, "running_var": one - _EPS}


def _silent(layer: _Layer) -> _Layer:
    """A layer with the scale 0, from which training can take it."""
    return {**layer, "weight": torch.zeros_like(layer["weight"]), "bias": torch.zeros_like(layer["bias"])}


def _reading(layer: _Layer, channels: int) -> _Layer:
    """A layer that reads so many channels: the first of those it read, or zeros beside them."""
    kernel = layer["kernel"][:, :channels]
    more = kernel.new_zeros(len(kernel), channels - kernel.shape[1], *kernel.shape[2:])
    return {**layer, "kernel": torch.cat([kernel, more], 1)}


def _folded(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Kernel and bias that do what kernel and norm do."""
    scale = layer["weight"] / (layer["running_var"] + _EPS).sqrt()
    return layer["kernel"] * scale[:, None, None, None], layer["bias"] - layer["running_mean"] * scale
