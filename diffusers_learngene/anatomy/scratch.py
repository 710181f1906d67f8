# SPDX-License-Identifier: Apache-2.0
"""Training from scratch: the class's own random initialisation (for DiT, the paper's)."""

import diffusers
import torch
from torch import nn

from .dit import create_dit
from .models import model_config, new_model
from .sizes import override_config


def scratch(ancestry: nn.Module, overrides: dict, *, seed: int = 0) -> nn.Module:
    """A randomly initialised model of the ancestry's class and another size.

    Raises:
        ValueError: an override that the config does not have or the class refuses.
    """
    cls = type(ancestry)
    config = override_config(cls.__name__, model_config(ancestry), overrides)
    if issubclass(cls, diffusers.DiTTransformer2DModel):
        return create_dit(generator=torch.Generator().manual_seed(seed), **config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return new_model(cls.__name__, config)
