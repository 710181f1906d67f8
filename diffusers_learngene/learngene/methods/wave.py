# SPDX-License-Identifier: Apache-2.0
"""WAVE in the words of the artefact."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import wave
from ...tuners.base_config import check_numbers
from ...tuners.kind.classes import ClassTailors
from ...tuners.wave import WAVEConfig
from .protocol import Bank, Resize, Shape, Sizes, Start
from .shared import SharedBanks


class WAVE(SharedBanks):
    """Templates are the same at every width; the scalers are refitted to them."""

    name = "wave"
    bank_tensors: tuple[str, ...] = ("templates",)
    scaler_name = "scaler"
    shares_scaler = False
    starts: tuple[Start, ...] = ("layers", "fit", "random")
    config_cls = WAVEConfig

    def config(self, sizes: Sizes, class_tailors: ClassTailors | None, **fields: Any) -> WAVEConfig:
        return WAVEConfig(template_pattern=sizes, **fields)

    def check_size(self, name: str, size: Any) -> None:
        if not isinstance(size, list) or len(size) != 3:
            raise ValueError(f"{name}={size!r} must be [templates, height, width].")
        check_numbers(name, size)
        if size[0] > size[1] * size[2]:
            raise ValueError(f"{name}={size!r} has more templates than numbers in one.")

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        return {"templates": tuple(size)}

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        return size[0], *wave.grid(shape, size[1:])

    def layers_held(self, size: Shape, shapes: Sequence[Shape], depth: int) -> tuple[int, bool]:
        tiles = _tiles(size, shapes)
        return (depth, True) if _exact(size, tiles * depth) else (size[0] // tiles, size[0] % tiles == 0)

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        count, *sides = size
        tiles, depth = _tiles(size, [weight.shape[1:] for weight in weights]), len(weights[0])
        if layers and (count >= tiles * depth or not _exact(size, tiles * depth)):
            scalers, templates = wave.repeat_layers(weights, layers, sides, count)
        else:
            scalers, templates = wave.factorize(weights, sides, count)
        return scalers, {"templates": templates}

    def random(
        self, depth: int, size: Shape, shapes: Sequence[Shape], zero: bool, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        scalers = [torch.randn(depth, *self.scaler_shape(size, shape), generator=generator) for shape in shapes]
        scalers = [torch.zeros_like(scaler) for scaler in scalers] if zero else scalers
        return scalers, {"templates": wave.random_init(shapes, size[0], size[1:], generator)}

    def compose(self, scaler: Tensor, bank: Bank, shape: Shape, offset: int) -> Tensor:
        return wave.compose(scaler, bank["templates"], shape=shape)

    def resize_bank(self, bank: Bank, shapes: Sequence[Shape], targets: Sequence[Shape], resize: Resize) -> Bank:
        return bank

    def resize_scaler(self, scaler: Tensor, bank: Bank, shape: Shape, target: Shape, resize: Resize) -> Tensor:
        dense = wave.compose(scaler, bank["templates"], shape=shape)
        return wave.fit_scaler(resize(dense, tuple(target), 1), bank["templates"])


def _tiles(size: Shape, shapes: Sequence[Shape]) -> int:
    """How many tiles one layer has in a group."""
    return sum(a * b for a, b in (wave.grid(shape, size[1:]) for shape in shapes))


def _exact(size: Shape, tiles: int) -> bool:
    """Whether there are as many templates as can be of use to so many tiles: then the SVD of these loses nothing."""
    count, height, width = size
    return count >= min(tiles, height * width)
