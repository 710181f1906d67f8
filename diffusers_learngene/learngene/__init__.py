# SPDX-License-Identifier: Apache-2.0
"""The artefact: what a learngene is, how it is made of a model (`condense`), and models of it (`descend`).

Here lives whatever turns a model into the tensors of a learngene and back: `closed_form`, `layout`, `generated`, and
in `methods/` what each method makes of banks and scalers. Not here: training (`training/`), PEFT's side (`tuners/`).
"""

from .learngene import ArtefactConfig, Learngene, LearngeneError


__all__ = ["ArtefactConfig", "Learngene", "LearngeneError"]
