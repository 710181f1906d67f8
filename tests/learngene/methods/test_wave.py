# SPDX-License-Identifier: Apache-2.0
"""Starts of WAVE's bank."""

import pytest
import torch

from ancestries import ancestry
from diffusers_learngene import Learngene, WAVEConfig
from diffusers_learngene.learngene.methods import METHODS
from models import run


@pytest.mark.parametrize("start", ["layers", "fit"])
@pytest.mark.parametrize("name", ["dit", "bert", "vit"])
def test_a_bank_that_spans_everything_is_exact(name, start):
    """Also where every group could hold whole layers instead: as many templates as there are numbers in one."""
    tiny = ancestry(name)
    learngene = Learngene.condense(tiny.model, WAVEConfig(template_size=4, num_templates=16), start=start)
    torch.testing.assert_close(run(learngene.descend(), tiny.inputs), tiny(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "held"),
    [(1, (0, False)), (4, (1, True)), (6, (1, False)), (8, (2, True)), (15, (3, False)), (16, (5, True))],
)
def test_how_many_layers_a_bank_holds(count, held):
    """Layers of 4 tiles of 4 x 4; 16 templates span all that there is."""
    assert METHODS["wave"].layers_held([count, 4, 4], [(8, 8)], depth=5) == held
