# SPDX-License-Identifier: Apache-2.0
"""Hosts of circuits that tests share."""

import torch
from torch import nn

from diffusers_learngene.evolution.gtl.networks import INPUT, Kernel, NetworkConfig, create_network


VGG = NetworkConfig("vgg", (8, 12, 16), (1, 2, 1))
RESNET = NetworkConfig("resnet", (8, 12, 16), (1, 2, 1))


def lived_(network, seed=0):
    """Give every norm of a network, as training would, scales, shifts and statistics of its own; in place."""
    draws = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=draws))
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=draws))
    return network


def host(config, seed=0):
    return lived_(create_network(config, 5, seed=seed), seed).eval()


class Own(nn.Module):
    """A residual network that is not built in: other names, biases, a stride, a layer without a norm."""

    def __init__(self, width=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.inner = nn.Conv2d(width, width + 3, 3, padding=1)
        self.inner_bn = nn.BatchNorm2d(width + 3)
        self.outer = nn.Conv2d(width + 3, width, 1, bias=False)
        self.outer_bn = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, 4)

    def features(self, images):
        x = self.stem(images)
        y = nn.functional.gelu(self.inner_bn(self.inner(x)))
        return (x + self.outer_bn(self.outer(y))).mean((2, 3))


OWN_LAYOUT = [
    Kernel("stem", None, INPUT, "trunk"),
    Kernel("inner", "inner_bn", "trunk", "branch"),
    Kernel("outer", "outer_bn", "branch", "trunk"),
]
