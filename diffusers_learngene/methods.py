# SPDX-License-Identifier: Apache-2.0
"""The methods of which a learngene can be: what `functional/` computes, in the words of the artefact.

Every method makes the matrix of a layer from a *bank* and a *scaler*:

    WAVE   bank: templates (N, w1, w2)       scaler (N, a, b) of every matrix   size of a bank: [N, w1, w2]
    FINE   bank: u (m1, r), v (m2, r)        sigma (r,) of every layer          size of a bank: [r]
    KIND   bank: u (L, m1, r), v (L, m2, r)  sigma (r,) of every layer          size of a bank: [learngenes, tailors]

WAVE's and FINE's banks are shared by all layers of a group, the scaler being a few numbers of the layer's own. Such a
bank is the learngene proper: no depth changes it, and widths change it by cutting or repeating channels at most. In
KIND, nothing is shared over layers, of which each has its own slice of the bank (`per_layer`). What is shared there is
the first components, by all classes; so it is classes that can be left out and added, not layers and channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .classes import ClassTailors, check_class_tailors, num_units
from .functional import fine, kind, wave
from .method import Bank, Method, Resize, Shape, Sizes, Start
from .tuners.base_config import LearngeneConfig, check_integer, check_numbers
from .tuners.fine import FINEConfig
from .tuners.kind import KINDConfig
from .tuners.wave import WAVEConfig


class _Shared:
    """A method of which layers share the banks, and that knows no classes."""

    per_layer = False

    def class_tailors(self, config: Any, num_labels: int | None = None) -> None:
        return None

    def check_classes(self, value: Any, sizes: Sizes, num_labels: int | None) -> None:
        if value is not None:
            raise ValueError(f"class_tailors={value!r} must be null: only KIND has classes.")


class WAVE(_Shared):
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


class FINE(_Shared):
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


class KIND:
    """Every layer has its own U, sigma and V, of which a class opens its tailors; here, all of them are open.

    (W of one class is that of sigma times its gate.)
    """

    name = "kind"
    bank_tensors: tuple[str, ...] = ("u", "v")
    scaler_name = "sigma"
    shares_scaler = True
    per_layer = True
    starts: tuple[Start, ...] = ("fit",)
    config_cls = KINDConfig

    def config(self, sizes: Sizes, class_tailors: ClassTailors | None, **fields: Any) -> KINDConfig:
        assert class_tailors is not None
        units: list[list[int]] = [[] for _ in range(num_units(class_tailors))]
        for index, opened in enumerate(class_tailors):
            for unit in opened or ():
                units[unit].append(index)
        return KINDConfig(
            num_classes=len(class_tailors),
            known_classes=[index for index, opened in enumerate(class_tailors) if opened is not None],
            class_groups=units or None,
            class_gate=None if units else [[0] for _ in class_tailors],
            group_sizes=sizes,
            **fields,
        )

    def class_tailors(self, config: Any, num_labels: int | None = None) -> ClassTailors:
        config.resolve_classes(num_labels)
        matrix, known = config.gate_matrix()
        rows = zip(matrix[:-1], known[:-1].tolist(), strict=True)  # without the null class
        result = [row.nonzero().flatten().tolist() if is_known else None for row, is_known in rows]
        check_class_tailors(result, {}, num_labels)
        if 0 < num_units(result) < matrix.shape[1]:
            raise ValueError(
                f"of the tailors of {matrix.shape[1]} units, those after {num_units(result)} are nobody's."
            )
        return result

    def check_classes(self, value: Any, sizes: Sizes, num_labels: int | None) -> None:
        check_class_tailors(value, sizes, num_labels)

    def check_size(self, name: str, size: Any) -> None:
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError(f"{name}={size!r} must be [learngenes, tailors].")
        for number in size:
            check_integer(name, number, least=0)
        check_integer(f"{name}: their number", sum(size))

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        return {"u": (sum(m1 for m1, _ in shapes), sum(size)), "v": (shapes[0][1], sum(size))}

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        return (sum(size),)

    def layers_held(self, size: Shape, shapes: Sequence[Shape]) -> tuple[int, bool]:
        raise NotImplementedError("`starts` leaves layers out")

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int], full: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        fused = torch.cat(list(weights), dim=1)
        sigma, u, v = kind.factorize(fused, sum(size))
        # adaLN-Zero: of zero, the SVD knows no directions.
        for layer in (~fused.flatten(1).any(1)).nonzero().flatten():
            u[layer], v[layer] = fine.random_factors(fused.shape[1:], sum(size))
        return [sigma], {"u": u, "v": v}

    def random(
        self, depth: int, size: Shape, shapes: Sequence[Shape], zero: bool, generator: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        raise NotImplementedError("`starts` leaves it out")

    def compose(self, scaler: Tensor, bank: Bank, shape: Shape, offset: int) -> Tensor:
        return (bank["u"][..., offset : offset + shape[0], :] * scaler[..., None, :]) @ bank["v"].mT

    def resize_bank(self, bank: Bank, shapes: Sequence[Shape], targets: Sequence[Shape], resize: Resize) -> Bank:
        raise NotImplementedError("ArtefactConfig.override refuses other widths")

    def resize_scaler(self, scaler: Tensor, bank: Bank, shape: Shape, target: Shape, resize: Resize) -> Tensor:
        raise NotImplementedError("ArtefactConfig.override refuses other widths")


METHODS: dict[str, Method] = {method.name: method for method in (WAVE(), FINE(), KIND())}


def method_of(config: LearngeneConfig) -> Method:
    """The method that a config is of.

    Raises:
        ValueError: of none that makes learngenes.
    """
    for method in METHODS.values():
        if isinstance(config, method.config_cls):
            return method
    kinds = ", ".join(method.config_cls.__name__ for method in METHODS.values())
    raise ValueError(f"config={config!r} must be one of {kinds}.")
