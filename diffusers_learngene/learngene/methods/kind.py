# SPDX-License-Identifier: Apache-2.0
"""KIND in the words of the artefact."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import fine, kind
from ...tuners.base_config import check_integer
from ...tuners.kind import KINDConfig
from ...tuners.kind.classes import ClassTailors, check_class_tailors, num_units
from .protocol import Bank, Resize, Shape, Sizes, Start


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

    def layers_held(self, size: Shape, shapes: Sequence[Shape], depth: int) -> tuple[int, bool]:
        raise NotImplementedError("`starts` leaves layers out")

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int]
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
