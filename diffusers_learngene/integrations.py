# SPDX-License-Identifier: Apache-2.0
"""The only file that writes into other libraries' tables.

PEFT looks everything about a method up in four dicts keyed by `config.peft_type`. Its own enum of types is closed, but
the dicts take any key that hashes like the string in `adapter_config.json`: an enum of ours whose members' names equal
their values does (`Enum.__hash__` hashes the name), and it has the `.value` that transformers reads.
"""

from enum import Enum
from typing import TYPE_CHECKING

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


if TYPE_CHECKING:
    from .tuners.base_config import LearngeneConfig


class LearngenePeftType(str, Enum):  # noqa: UP042 (StrEnum would be equal; PEFT's own types derive from both as well)
    """PEFT types of this package. The long names keep clear of PEFT's own, present (`WAVEFT`) and future."""

    LEARNGENE_WAVE = "LEARNGENE_WAVE"
    LEARNGENE_FINE = "LEARNGENE_FINE"
    LEARNGENE_KIND = "LEARNGENE_KIND"

    @property
    def prefix(self) -> str:
        """What the names of the method's tensors start with; transformers expects exactly this form."""
        return self.value.lower() + "_"


def register_peft_methods() -> None:
    """Make PEFT, diffusers and transformers know our methods. Calling it again changes nothing.

    Raises:
        KeyError: another package has registered one of our names.
    """
    from .tuners.fine import FINEConfig, FINEModel
    from .tuners.kind import KINDConfig, KINDModel
    from .tuners.wave import WAVEConfig, WAVEModel

    entries = [
        (table, peft_type, entry)
        for peft_type, config, model in (
            (LearngenePeftType.LEARNGENE_WAVE, WAVEConfig, WAVEModel),
            (LearngenePeftType.LEARNGENE_FINE, FINEConfig, FINEModel),
            (LearngenePeftType.LEARNGENE_KIND, KINDConfig, KINDModel),
        )
        for table, entry in (
            (PEFT_TYPE_TO_CONFIG_MAPPING, config),
            (PEFT_TYPE_TO_TUNER_MAPPING, model),
            (PEFT_TYPE_TO_PREFIX_MAPPING, peft_type.prefix),
        )
    ]
    for table, peft_type, entry in entries:
        if table.get(peft_type, entry) != entry:
            raise KeyError(f"The PEFT method {peft_type.value} is already registered as {table[peft_type]!r}.")
    for table, peft_type, entry in entries:
        table[peft_type] = entry


def learngene_config_class(peft_type: str) -> "type[LearngeneConfig] | None":
    """The config class of one of our methods, None for every other name."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] if peft_type in LearngenePeftType.__members__ else None
