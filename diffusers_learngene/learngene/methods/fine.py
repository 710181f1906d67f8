# SPDX-License-Identifier: Apache-2.0
"""FINE in the words of the artefact."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import fine
from ...tuners.base_config import check_numbers
from ...tuners.fine import FINEConfig
from ...tuners.kind.classes import ClassTailors
from .protocol import Bank, Resize, Shape, Sizes, Start
from .shared import SharedBanks


class FINE(SharedBanks):
    """sigma is the same at every width; rows of U and V are the channels, and are cut or repeated as W's would be.

    R U diag(sigma) (C V)^T = R W C^T: what cutting and repeating do to W, they do to U and V, without loss.
    """

    name = "fine"
    bank_tensors: tuple[str, ...] = ("u", "v")
    scaler_name = "sigma"
    shares_scaler = True
    starts: tuple[Start, ...] = ("fit", "layers", "random")
    config_cls = FINEConfig

    def config(self, sizes: Sizes, class_tailors: ClassTailors | None, **fields: Any) -> FINEConfig:
        ranks = {key: rank for key, (rank,) in sizes.items()}
        return FINEConfig(group_ranks=ranks, **fields)

    def check_size(self, name: str, size: Any) -> None:
        if not isinstance(size, list) or len(size) != 1:
            raise ValueError(f"{name}={size!r} must be [rank].")
        check_numbers(name, size)

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        return {"u": (sum(m1 for m1, _ in shapes), size[0]), "v": (shapes[0][1], size[0])}

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        return (size[0],)

    def layers_held(self, size: Shape, shapes: Sequence[Shape], depth: int) -> tuple[int, bool]:
        side = fine.default_rank(shapes)
        return max(1, size[0] // side), size[0] % side == 0

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        fused = torch.cat(list(weights), dim=1)
        sigma, u, v = fine.hold_layers(fused, layers, size[0]) if layers else fine.factorize(fused, size[0])
        return [sigma], {"u": u, "v": v}

    def random(
        self, depth: int, size: Shape, shapes: Sequence[Shape], zero: bool, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        fused = sum(m1 for m1, _ in shapes), shapes[0][1]
        u, v = fine.random_factors(fused, size[0], generator)
        std = 0.0 if zero else fine.sigma_std(fused, size[0])
        return [torch.randn(depth, size[0], generator=generator) * std], {"u": u, "v": v}

    def compose(self, scaler: Tensor, bank: Bank, shape: Shape, offset: int) -> Tensor:
        return fine.compose(scaler, bank["u"][offset : offset + shape[0]], bank["v"])

    def resize_bank(self, bank: Bank, shapes: Sequence[Shape], targets: Sequence[Shape], resize: Resize) -> Bank:
        rank = bank["u"].shape[1]
        parts = bank["u"].split([m1 for m1, _ in shapes])
        u = [resize(part, (m1, rank), None) for part, (m1, _) in zip(parts, targets, strict=True)]
        return {"u": torch.cat(u), "v": resize(bank["v"], (targets[0][1], rank), 0)}

    def resize_scaler(self, scaler: Tensor, bank: Bank, shape: Shape, target: Shape, resize: Resize) -> Tensor:
        return scaler
