# SPDX-License-Identifier: Apache-2.0
"""What any diffusers / transformers model is: blocks, roles and groups, residual ends, config, sizes; DiT's traps.

Here lives whatever reads a model (`Anatomy.of(model)` is the whole of it), and what it takes to make one of a config;
it knows no method and no artefact. Not here: what is done with it (`tuners/`, `learngene/`, `initializers/`).
"""

from .anatomy import Anatomy, handed_on
from .kinds import BlockKind
from .residual import End


__all__ = ["Anatomy", "BlockKind", "End", "handed_on"]
