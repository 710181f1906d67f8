# SPDX-License-Identifier: Apache-2.0
"""Other depths and the other architecture: exact where nothing is lost, and said where something is."""

import warnings

import pytest
import torch

from diffusers_learngene import Circuit
from diffusers_learngene.evolution.gtl.circuit import random_sets, set_sizes
from diffusers_learngene.evolution.gtl.networks import layout_of, widths_of
from gtl_hosts import RESNET, VGG, host, lived_


def circuit_of(config):
    network = host(config)
    widths = widths_of(network.state_dict(), layout_of(config))
    return Circuit.extract(network, random_sets(widths, set_sizes(widths, 0.3), torch.Generator().manual_seed(0)))


EXACT = [
    (VGG, "vgg", (1, 2, 1)),
    (VGG, "vgg", (3, 2, 4)),
    (VGG, "resnet", (1, 1, 1)),
    (VGG, "resnet", (1, 3, 2)),
    (RESNET, "resnet", (1, 2, 1)),
    (RESNET, "resnet", (2, 3, 1)),
    (RESNET, "vgg", (3, 6, 3)),
    (RESNET, "vgg", (4, 7, 3)),
]
LOSSY = [
    (VGG, "vgg", (1, 1, 1)),
    (VGG, "vgg", (1, 2)),
    (VGG, "resnet", (1, 1, 1, 1)),
    (RESNET, "resnet", (1, 1, 1)),
    (RESNET, "vgg", (1, 2, 1)),
]


def name(value):
    return getattr(value, "architecture", str(value))


@pytest.mark.parametrize("config, architecture, depths", EXACT, ids=name)
def test_a_translation_without_loss_is_exact(config, architecture, depths):
    circuit = circuit_of(config)
    images, channels = 3 * torch.randn(4, 3, 16, 16), circuit.sizes["2.0"]
    expected = circuit.descend(5, widths=(8, 12, 16)).eval().features(images)[:, :channels]
    for seed in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = circuit.descend(5, architecture=architecture, depths=depths, widths=(21, 40, 50), seed=seed).eval()
        for key, value in lived_(other.__class__(other.config, 5), seed).state_dict().items():
            if key.endswith("running_mean"):  # the rest may have seen anything
                other.state_dict()[key][circuit_end(key, circuit) :] = value[circuit_end(key, circuit) :]
        torch.testing.assert_close(other.features(images)[:, :channels], expected, rtol=1e-4, atol=1e-5)


def circuit_end(key, circuit):
    """Channels from here on are random in any translation: those of the circuit, and what it carries beside them."""
    return 20 if key.startswith("stages.0") else 30


@pytest.mark.parametrize("config, architecture, depths", LOSSY, ids=name)
def test_a_loss_is_said(config, architecture, depths):
    circuit, widths = circuit_of(config), (21, 40, 50, 60)[: len(depths)]
    with pytest.warns(UserWarning, match="has not room for all layers"):
        descendant = circuit.descend(5, architecture=architecture, depths=depths, widths=widths)
    assert torch.isfinite(descendant(torch.randn(2, 3, 16, 16))).all()


def test_training_can_use_what_was_added():
    descendant = circuit_of(VGG).descend(5, architecture="resnet", depths=(1, 2, 1), widths=(21, 40, 50))
    descendant(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for key, parameter in descendant.named_parameters() if "norm" in key)
