# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch

from diffusers_learngene.evolution.gtl.networks import (
    INPUT,
    WIDTHS,
    ConvNet,
    Kernel,
    NetworkConfig,
    check_layout,
    create_network,
    layout_of,
    widths_of,
)
from gtl_hosts import OWN_LAYOUT, RESNET, VGG, Own, host


@pytest.mark.parametrize("name", WIDTHS)
def test_built_in_networks_are_what_their_layouts_say(name):
    config = NetworkConfig.named(name)
    with torch.device("meta"):
        network = ConvNet(config, 5)
    state, layout = network.state_dict(), layout_of(config)
    check_layout(state, layout)
    named = {f"{kernel.conv}.weight" for kernel in layout}
    assert named == {key for key, tensor in state.items() if tensor.ndim == 4}
    assert len(layout) == {"vgg": 8, "resnet": 16}[config.architecture]
    assert widths_of(state, layout)[layout[-1].writes] == config.widths[-1] == network.head.in_features


@pytest.mark.parametrize("config", [VGG, RESNET], ids=lambda config: config.architecture)
@pytest.mark.parametrize("size", [1, 9, 16])
def test_images_of_any_size(config, size):
    assert host(config)(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_weights_are_those_of_the_seed_and_nothing_else_is_drawn():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (create_network(VGG, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "stages.1.convs.0.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "vit"}, "architecture='vit' is not one of ['vgg', 'resnet']"),
        ({"widths": ()}, "widths=() must have a number"),
        ({"widths": (8, 0, 16)}, "widths=(8, 0, 16) must be whole numbers from 1"),
        ({"widths": (8, 2.5, 16)}, "widths=(8, 2.5, 16) must be whole"),
        ({"widths": (8, 10**9, 16)}, "must be whole numbers from 1 to 8192"),
        ({"depths": (1, 2)}, "must have a number for each stage"),
        ({"depths": (1, True, 1)}, "must be whole numbers"),
        ({"image_channels": 0}, "image_channels=0 must be"),
    ],
)
def test_what_no_network_can_be(changes, message):
    values = {"architecture": "vgg", "widths": (8, 12, 16), "depths": (1, 2, 1)}
    with pytest.raises(ValueError, match=re.escape(message)):
        NetworkConfig(**values | changes)
    with pytest.raises(ValueError, match="architecture='vgg16' is not one of"):
        NetworkConfig.named("vgg16")


@pytest.mark.parametrize(
    "place, kernel, message",
    [
        (1, Kernel("middle", "inner_bn", "trunk", "branch"), "no convolution 'middle'"),
        (1, Kernel("classifier", "inner_bn", "trunk", "branch"), "no convolution 'classifier'"),
        (1, Kernel("inner", "bn", "trunk", "branch"), "no batch norm 'bn'"),
        (1, Kernel("inner", "inner_bn", "elsewhere", "branch"), "no kernel before it writes 'elsewhere'"),
        (1, Kernel("inner", "inner_bn", "trunk", INPUT), "the image cannot be written"),
        (1, Kernel("inner", "inner_bn", "trunk", "trunk"), "its channels (out, in) are (13, 10), not (10, 10)"),
    ],
)
def test_a_layout_that_the_network_does_not_have(place, kernel, message):
    layout = list(OWN_LAYOUT)
    layout[place] = kernel
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(Own().state_dict(), layout)
    with pytest.raises(ValueError, match="layout is empty"):
        check_layout(Own().state_dict(), [])
