# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_learngene.evolution.gtl.networks import NetworkConfig
from diffusers_learngene.evolution.gtl.tasks import ClassImages


@pytest.fixture(scope="session")
def images():
    """24 classes of 10 gray images of 8 x 8 pixels; each class has a pattern of its own under noise."""
    draws = torch.Generator().manual_seed(0)
    patterns = torch.rand(24, 1, 1, 8, 8, generator=draws)
    pixels = (patterns + 0.3 * torch.randn(24, 10, 1, 8, 8, generator=draws)).clamp(0, 1).mul(255).byte().flatten(0, 1)
    rows = list(torch.arange(240).view(24, 10))
    return ClassImages(pixels, rows, [f"class {index}" for index in range(24)])


@pytest.fixture(scope="session")
def classes():
    return {"base": list(range(12)), "critic": list(range(12, 18)), "novel": list(range(18, 24))}


@pytest.fixture(scope="session")
def tiny():
    return NetworkConfig("vgg", (4, 6), (1, 2), image_channels=1)
