# SPDX-License-Identifier: Apache-2.0
"""The PEFT types of this package.

PEFT looks everything about a method up in dicts keyed by `config.peft_type`. Its own enum of types is closed, but the
dicts take any key that hashes like the string in `adapter_config.json`: an enum whose members' names equal their
values does (`Enum.__hash__` hashes the name), and it has the `.value` that transformers reads.
"""

from enum import Enum


class LearngenePeftType(str, Enum):  # noqa: UP042 (StrEnum would be equal; PEFT's own types derive from both as well)
    """PEFT types of this package. The long names keep clear of PEFT's own, present (`WAVEFT`) and future."""

    LEARNGENE_WAVE = "LEARNGENE_WAVE"
    LEARNGENE_FINE = "LEARNGENE_FINE"
    LEARNGENE_KIND = "LEARNGENE_KIND"

    @property
    def prefix(self) -> str:
        """What the names of the method's tensors start with; transformers expects exactly this form."""
        return self.value.lower() + "_"
