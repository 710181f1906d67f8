# SPDX-License-Identifier: Apache-2.0
"""What WAVE and FINE have in common: layers share the banks."""

from typing import Any

from .protocol import Sizes


class SharedBanks:
    """A method of which layers share the banks, and that knows no classes."""

    per_layer = False

    def class_tailors(self, config: Any, num_labels: int | None = None) -> None:
        return None

    def check_classes(self, value: Any, sizes: Sizes, num_labels: int | None) -> None:
        if value is not None:
            raise ValueError(f"class_tailors={value!r} must be null: only KIND has classes.")
