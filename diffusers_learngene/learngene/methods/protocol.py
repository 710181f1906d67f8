# SPDX-License-Identifier: Apache-2.0
"""What the artefact needs of a method; `methods` has them all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...tuners.base_config import LearngeneConfig
from ...tuners.kind.classes import ClassTailors


Bank = Mapping[str, Tensor]
Shape = Sequence[int]
Sizes = dict[str, list[int]]  # of banks, by group
Start = Literal["layers", "fit", "random"]  # of condensing: see `closed_form`
# (tensor, shape that its last axes shall have, axis of that shape that is summed over) -> tensor
Resize = Callable[[Tensor, tuple[int, ...], int | None], Tensor]


class Method(Protocol):
    """A method in the words of the artefact; `shapes` are those of the matrices that one layer brings to a group."""

    name: str
    bank_tensors: tuple[str, ...]
    scaler_name: str  # of the scaler in a layer's state dict, after the method's prefix
    shares_scaler: bool  # whether q, k and v of a layer, rows of one fused matrix, have one scaler
    per_layer: bool  # whether a bank is the layers' own tensors, along an axis before those of `bank_shapes`
    starts: tuple[Start, ...]  # of condensing, the best first
    config_cls: type[LearngeneConfig]

    def config(self, sizes: Sizes, class_tailors: ClassTailors | None, **fields: Any) -> LearngeneConfig:
        """A config with banks of these sizes, by group.

        Args:
            class_tailors: which class opens which tailors, as below.
            fields: of `LearngeneConfig`: mode, target_modules, share_qkv.
        """

    def class_tailors(self, config: Any, num_labels: int | None = None) -> ClassTailors | None:
        """Which class opens which tailors (`classes`); None where there are no classes.

        Args:
            config: is completed in place, if it leaves it to the model's labels how many classes there are.
            num_labels: how many classes the model has labels for; None: it has none.

        Raises:
            ValueError: there are no classes, others than the model has labels for, or tailors that are nobody's.
        """

    def check_size(self, name: str, size: Any) -> None:
        """Raise a ValueError unless `size`, which came from a file, is the size of a bank."""

    def check_classes(self, value: Any, sizes: Sizes, num_labels: int | None) -> None:
        """Raise a ValueError unless `value`, which came from a file, is `class_tailors` for banks of these sizes."""

    def bank_shapes(self, size: Shape, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a bank, or of a layer's own."""

    def scaler_shape(self, size: Shape, shape: Shape) -> tuple[int, ...]:
        """Shape of the scaler of a matrix."""

    def layers_held(self, size: Shape, shapes: Sequence[Shape], depth: int) -> tuple[int, bool]:
        """How many of `depth` whole layers a bank can hold, and whether these fill it; all, if it is exact anyway."""

    def start(
        self, weights: Sequence[Tensor], size: Shape, layers: Sequence[int]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Scalers and bank in closed form, of weights (L, m1, m2), one tensor a matrix of the group.

        Args:
            layers: to be held as a whole, the others starting as the nearest of them; none: the least-squares fit.

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
