# SPDX-License-Identifier: Apache-2.0
"""VGG11 and ResNet12 at any width and depth, and the plain description by which any conv net can host a circuit.

A `Kernel` says of one convolution, by the names of modules, which index set of channels it reads and which it writes,
and which batch norm follows it. Convolutions whose outputs are added write one set, so they share its indices:

    VGG      stages.0.convs.0  input -> 0.0        stages.0.convs.1  0.0 -> 0.1       ...
    ResNet   stages.0.0.conv1  input -> 0.0.1      stages.0.0.conv2  0.0.1 -> 0.0.2
             stages.0.0.conv3  0.0.2 -> 0.0        stages.0.0.shortcut  input -> 0.0  ...

Both have one linear head behind a global average, which is never part of a circuit, and ReLUs, also where ResNet12 is
often given leaky ones: what leaves a stage is then never negative, so that identity kernels can carry it on unchanged
(`translation`). A pool halves, and leaves a picture of one pixel as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


__all__ = [
    "DEPTHS",
    "INPUT",
    "NORM_ENTRIES",
    "WIDTHS",
    "Kernel",
    "NetworkConfig",
    "check_convolutions",
    "check_layout",
    "create_network",
    "layout_of",
    "shapes_of",
    "widths_of",
]

NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")
INPUT = "input"  # the index set of the image's channels, which is always whole
WIDTHS = {
    "vgg11": (64, 128, 256, 512, 512),
    "vgg11-smoke": (8, 16, 32, 64, 64),  # an eighth: for a CPU
    "resnet12": (64, 160, 320, 640),
    "resnet12-narrow": (64, 128, 256, 512),
    "resnet12-smoke": (8, 16, 32, 64),
}
DEPTHS = {"vgg": (1, 1, 2, 2, 2), "resnet": (1, 1, 1, 1)}  # convolutions, or residual blocks of three, a stage
_MAX_WIDTH, _MAX_DEPTH = 2**13, 64


@dataclass(frozen=True)
class Kernel:
    """One convolution of a network.

    Attributes:
        conv, norm: names of the modules; norm is None if no batch norm follows.
        reads, writes: names of index sets of channels.
    """

    conv: str
    norm: str | None
    reads: str
    writes: str


@dataclass(frozen=True)
class NetworkConfig:
    """A built-in network.

    Attributes:
        architecture: "vgg" or "resnet".
        widths: channels of each stage; a stage ends with a pool.
        depths: convolutions (vgg) or residual blocks (resnet) of each stage.
        image_channels: 1 (gray) or 3.

    Raises:
        ValueError: a value that cannot be.
    """

    architecture: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.architecture not in DEPTHS:
            raise ValueError(f"architecture={self.architecture!r} is not one of {list(DEPTHS)}.")
        for name, most in (("widths", _MAX_WIDTH), ("depths", _MAX_DEPTH)):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values or len(values) > 16:
                raise ValueError(f"{name}={values!r} must have a number for each of 1 to 16 stages.")
            if not all(type(value) is int and 1 <= value <= most for value in values):
                raise ValueError(f"{name}={values!r} must be whole numbers from 1 to {most}.")
            object.__setattr__(self, name, tuple(values))
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths={self.widths} and depths={self.depths} must have a number for each stage.")
        if type(self.image_channels) is not int or not 1 <= self.image_channels <= _MAX_WIDTH:
            raise ValueError(f"image_channels={self.image_channels!r} must be a whole number, 1 or 3.")

    @classmethod
    def named(cls, name: str, image_channels: int = 3) -> "NetworkConfig":
        """One of WIDTHS.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in WIDTHS:
            raise ValueError(f"architecture={name!r} is not one of {list(WIDTHS)}.")
        architecture = "vgg" if name.startswith("vgg") else "resnet"
        return cls(architecture, WIDTHS[name], DEPTHS[architecture], image_channels)


class _ChainStage(nn.Module):
    def __init__(self, reads: int, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width if place else reads, width, 3, padding=1, bias=False) for place in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class _ResidualBlock(nn.Module):
    def __init__(self, reads: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(reads, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(reads, width, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut_norm(self.shortcut(x)))


class ConvNet(nn.Module):
    """The built-in networks: `features` (b, widths[-1]) of images (b, C, H, W), and the logits of a linear head."""

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        reads = config.image_channels
        for width, depth in zip(config.widths, config.depths, strict=True):
            if config.architecture == "vgg":
                stages.append(_ChainStage(reads, width, depth))
            else:
                blocks = [_ResidualBlock(width if place else reads, width) for place in range(depth)]
                stages.append(nn.Sequential(*blocks))
            reads = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(reads, num_classes)

    def features(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = F.max_pool2d(stage(images), 2, ceil_mode=True)
        return images.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def create_network(config: NetworkConfig, num_classes: int, *, seed: int) -> ConvNet:
    """A network with random weights: He's normal ones in the convolutions, torch's default in the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConvNet(config, num_classes)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def layout_of(config: NetworkConfig) -> list[Kernel]:
    """The convolutions of a built-in network, in the order in which they compute."""
    kernels, reads = [], INPUT
    for stage, depth in enumerate(config.depths):
        for place in range(depth):
            module, writes = f"stages.{stage}", f"{stage}.{place}"
            if config.architecture == "vgg":
                kernels.append(Kernel(f"{module}.convs.{place}", f"{module}.norms.{place}", reads, writes))
            else:
                module = f"{module}.{place}"
                one, two = f"{writes}.1", f"{writes}.2"
                kernels += [
                    Kernel(f"{module}.conv1", f"{module}.norm1", reads, one),
                    Kernel(f"{module}.conv2", f"{module}.norm2", one, two),
                    Kernel(f"{module}.conv3", f"{module}.norm3", two, writes),
                    Kernel(f"{module}.shortcut", f"{module}.shortcut_norm", reads, writes),
                ]
            reads = writes
    return kernels


def shapes_of(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of the tensors of a built-in network's convolutions and norms; nothing is allocated."""
    with torch.device("meta"):
        state = ConvNet(config, 1).state_dict()
    return {
        name: tuple(tensor.shape) for name, tensor in state.items() if tensor.ndim and not name.startswith("head.")
    }


def widths_of(state: Mapping[str, Tensor], layout: Sequence[Kernel]) -> dict[str, int]:
    """By index set, the number of channels that a network with this state dict has."""
    widths = {INPUT: state[f"{layout[0].conv}.weight"].shape[1]}
    return widths | {kernel.writes: len(state[f"{kernel.conv}.weight"]) for kernel in layout}


def check_layout(state: Mapping[str, Tensor], layout: Sequence[Kernel]) -> None:
    """Raise a ValueError that names the first kernel which a network with this state dict does not have as described:
    one that is missing, reads what was not written, or has another number of channels than its index sets, its norm
    or its bias."""
    if not layout:
        raise ValueError("layout is empty: it must name the convolutions of the network.")
    first = state.get(f"{layout[0].conv}.weight")
    widths = {INPUT: first.shape[1] if first is not None and first.ndim == 4 else 0}
    for kernel in layout:
        weight = state.get(f"{kernel.conv}.weight")
        if weight is None or weight.ndim != 4:
            raise ValueError(f"{kernel}: the network has no convolution {kernel.conv!r}.")
        norm = [state.get(f"{kernel.norm}.{entry}") for entry in NORM_ENTRIES] if kernel.norm is not None else []
        if any(values is None for values in norm):
            raise ValueError(
                f"{kernel}: the network has no batch norm {kernel.norm!r} with weights, biases and running statistics."
            )
        if kernel.writes == INPUT:
            raise ValueError(f"{kernel}: the image cannot be written.")
        if kernel.reads not in widths:
            raise ValueError(f"{kernel}: no kernel before it writes {kernel.reads!r}.")
        expected = (widths.setdefault(kernel.writes, len(weight)), widths[kernel.reads])
        if tuple(weight.shape[:2]) != expected:
            raise ValueError(f"{kernel}: its channels (out, in) are {tuple(weight.shape[:2])}, not {expected}.")
        for values in (*norm, state.get(f"{kernel.conv}.bias")):
            if values is not None and tuple(values.shape) != expected[:1]:
                raise ValueError(
                    f"{kernel}: its norm or bias has the shape {tuple(values.shape)}, not {expected[:1]}."
                )


def check_convolutions(network: nn.Module, layout: Sequence[Kernel]) -> None:
    """Raise a ValueError that names the first kernel of a layout which is not an `nn.Conv2d` with one group: of any
    other, rows and columns of the weights are not the channels that are written and read."""
    for kernel in layout:
        module = network.get_submodule(kernel.conv)
        if not isinstance(module, nn.Conv2d) or module.groups != 1:
            raise ValueError(
                f"{kernel}: {module} is not an nn.Conv2d with groups=1, and no other can be part of a circuit."
            )
