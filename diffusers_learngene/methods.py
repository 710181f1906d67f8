# SPDX-License-Identifier: Apache-2.0
"""The methods of which a learngene can be: what `functional/` computes, in the words of the artefact.

Every method makes the matrix of a layer from a *bank*, the tensors that all layers of a group share, and a *scaler*,
a few numbers of the layer's own:

    WAVE   bank: templates (N, w1, w2)         scaler (N, a, b) of every matrix     size of a bank: [N, w1, w2]
    FINE   bank: u (m1, r), v (m2, r)          sigma (r,) of every layer            size of a bank: [r]

The bank is the learngene proper: no depth changes it, and widths change it by cutting or repeating channels at most.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .functional import fine, wave
from .tuners.base_config import LearngeneConfig, Mode, check_numbers
from .tuners.fine import FINEConfig
from .tuners.wave import WAVEConfig


Bank = Mapping[str, Tensor]
Shape = Sequence[int]
Start = Literal["layers", "fit", "random"]  # of condensing: see `closed_form`
# (tensor, shape that its last axes shall have, axis of that shape that is summed over) -> tensor
Resize = Callable[[Tensor, tuple[int, ...], int | None], Tensor]


class Method(Protocol):
    """What the artefact needs of a method; `shapes` are those of the matrices that one layer brings to a group."""

    name: str
    bank_tensors: tuple[str, ...]
    scaler_name: str  # of the scaler in a layer's state dict, after the method's prefix
    shares_scaler: bool  # whether q, k and v of a layer, rows of one fused matrix, have one scaler
    best_start: Start

    def config(self, sizes: dict[str, list[int]], targets: list[str], share_qkv: bool, mode: Mode) -> LearngeneConfig:
        """A config that makes the matrices of these targets from banks of these sizes, by group."""

    def check_size(self, name: str, size: Any) -> None:
        """Raise a ValueError unless `size`, which came from a file, is the size of a bank."""

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a bank."""

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        """Shape of the scaler of a matrix."""

    def layers_held(self, size: Shape, shapes: Sequence[Shape]) -> tuple[int, bool]:
        """How many whole layers a bank can hold, and whether these fill it."""

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int], full: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Scalers and bank in closed form, of weights (L, m1, m2), one tensor a matrix of the group.

        Args:
            layers: to be held as a whole, the others starting as the nearest of them; none: the least-squares fit.
            full: whether these fill the bank.

        Returns:
            As many scalers (L, ...) as a layer has in the group, and the bank.
        """

    def random(
        self, depth: int, size: Shape, shapes: Sequence[Shape], zero: bool, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As `start`, at random: where an ancestry has nothing to teach. `zero`: the matrices start at zero."""

    def compose(self, scaler: Tensor, bank: Bank, shape: Shape, offset: int) -> Tensor:
        """Matrices (..., m1, m2) of a shape, rows from `offset` of the fused matrix; differentiable."""

    def resize_bank(self, bank: Bank, shapes: Sequence[Shape], targets: Sequence[Shape], resize: Resize) -> Bank:
        """The bank at another width, of which the layers' matrices have the shapes `targets`; differentiable."""

    def resize_scaler(self, scaler: Tensor, bank: Bank, shape: Shape, target: Shape, resize: Resize) -> Tensor:
        """The scaler at another width; `bank` is that of the width before."""


class WAVE:
    """Templates are the same at every width; the scalers are refitted to them."""

    name = "wave"
    bank_tensors: tuple[str, ...] = ("templates",)
    scaler_name = "scaler"
    shares_scaler = False
    best_start: Start = "layers"

    def config(self, sizes: dict[str, list[int]], targets: list[str], share_qkv: bool, mode: Mode) -> WAVEConfig:
        return WAVEConfig(mode=mode, target_modules=targets, template_pattern=sizes, share_qkv=share_qkv)

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

    def layers_held(self, size: Shape, shapes: Sequence[Shape]) -> tuple[int, bool]:
        tiles = sum(a * b for a, b in (wave.grid(shape, size[1:]) for shape in shapes))
        return size[0] // tiles, size[0] % tiles == 0

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int], full: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        count, *sides = size
        tiles = sum(len(w) * a * b for w, (a, b) in ((w, wave.grid(w.shape[1:], sides)) for w in weights))
        exact = count == min(tiles, sides[0] * sides[1])  # as many templates as can be used: the SVD loses nothing
        if layers and (full or not exact):
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


class FINE:
    """sigma is the same at every width; rows of U and V are the channels, and are cut or repeated as W's would be.

    R U diag(sigma) (C V)^T = R W C^T: what cutting and repeating do to W, they do to U and V, without loss.
    """

    name = "fine"
    bank_tensors: tuple[str, ...] = ("u", "v")
    scaler_name = "sigma"
    shares_scaler = True
    best_start: Start = "fit"

    def config(self, sizes: dict[str, list[int]], targets: list[str], share_qkv: bool, mode: Mode) -> FINEConfig:
        ranks = {key: rank for key, (rank,) in sizes.items()}
        return FINEConfig(mode=mode, target_modules=targets, group_ranks=ranks, share_qkv=share_qkv)

    def check_size(self, name: str, size: Any) -> None:
        if not isinstance(size, list) or len(size) != 1:
            raise ValueError(f"{name}={size!r} must be [rank].")
        check_numbers(name, size)

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        return {"u": (sum(m1 for m1, _ in shapes), size[0]), "v": (shapes[0][1], size[0])}

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        return (size[0],)

    def layers_held(self, size: Shape, shapes: Sequence[Shape]) -> tuple[int, bool]:
        side = fine.default_rank(shapes)
        return max(1, size[0] // side), size[0] % side == 0

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int], full: bool
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


METHODS: dict[str, Method] = {method.name: method for method in (WAVE(), FINE())}


def method_of(config: LearngeneConfig) -> Method:
    """The method that a config is of.

    Raises:
        ValueError: of none that makes learngenes.
    """
    for method, kind in zip(METHODS.values(), (WAVEConfig, FINEConfig), strict=True):
        if isinstance(config, kind):
            return method
    raise ValueError(f"config={config!r} must be a WAVEConfig or a FINEConfig.")
