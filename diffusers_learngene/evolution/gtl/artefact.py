# SPDX-License-Identifier: Apache-2.0
"""The artefact of GTL: the tensors of a circuit, a description, and a card.

    circuit.safetensors      kernels and batch norms under the names of the host's modules
    config.json, README.md

The description is in the metadata of the safetensors file; config.json repeats it for readers and for the Hub's
download counter. Data only: nothing is ever unpickled, and nothing in a file names code, or a path.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hub.descriptions import check_settings, check_version, exact_fields
from ...hub.shared import OneFileArtefact
from .circuit import IndexSets, circuit_sizes, extract, inherit_, parameters
from .networks import (
    INPUT,
    NORM_ENTRIES,
    ConvNet,
    Kernel,
    NetworkConfig,
    check_convolutions,
    check_layout,
    create_network,
    layout_of,
    shapes_of,
)
from .translation import translate


__all__ = ["Circuit", "CircuitConfig", "CircuitError"]

FORMAT_VERSION = 1
WEIGHTS = "circuit.safetensors"
_MAX_PARAMETERS = 2**30  # of a host: 4 GiB; ResNet12 at its width has 0.012 x 2**30
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)


class CircuitError(ValueError):
    """A circuit's file or folder that is incomplete, damaged, or none at all; the message names what is wrong."""


@dataclass(frozen=True)
class CircuitConfig:
    """What a circuit says about itself.

    Attributes:
        layout: the kernels of its host, in the order in which they compute.
        shapes: of its tensors, by name.
        host: the built-in network that it was extracted from; None: another, and only networks with the same modules
            can inherit it.
        host_parameters: of the host's kernels and norms, of which the circuit is a part.
        training: settings of the evolution: numbers, words, and lists of them.
        format_version: of this layout.

    Raises:
        ValueError: a value that cannot be, or shapes that are not a circuit of this layout.
    """

    layout: tuple[Kernel, ...]
    shapes: dict[str, tuple[int, ...]]
    host: NetworkConfig | None
    host_parameters: int
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_version(self.format_version, FORMAT_VERSION)
        for kernel in self.layout:
            for name in ("conv", "norm"):
                value = getattr(kernel, name)
                if not (name == "norm" and value is None or isinstance(value, str) and _MODULE.fullmatch(value)):
                    raise ValueError(f"layout: {name}={value!r} must be the name of a module.")
            if not all(isinstance(name, str) and name for name in (kernel.reads, kernel.writes)):
                raise ValueError(f"layout: reads={kernel.reads!r}, writes={kernel.writes!r} must be names.")
        for name, shape in self.shapes.items():
            if len(shape) not in (1, 4) or not all(type(size) is int and 1 <= size <= 2**13 for size in shape):
                raise ValueError(f"shapes: {name} is {shape!r}, not 1 or 4 whole numbers from 1 to {2**13}.")
        kernels = {f"{kernel.conv}.weight" for kernel in self.layout}
        norms = {f"{kernel.norm}.{entry}" for kernel in self.layout if kernel.norm for entry in NORM_ENTRIES}
        biases = {f"{kernel.conv}.bias" for kernel in self.layout}
        if lacks := (kernels | norms) - self.shapes.keys():
            raise ValueError(f"shapes lacks {sorted(lacks)[:5]} of the layout.")
        if extra := self.shapes.keys() - kernels - norms - biases:
            raise ValueError(f"shapes has {sorted(extra)[:5]}, which are not in the layout.")
        check_layout({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}, self.layout)
        if self.host is not None and tuple(layout_of(self.host)) != self.layout:
            raise ValueError(f"host={self.host} has another layout than this one.")
        if type(self.host_parameters) is not int or not self.host_parameters >= self.num_parameters:
            raise ValueError(f"host_parameters={self.host_parameters!r}: the circuit has {self.num_parameters}.")
        if self.host is not None:
            self._check_host(self.host)
        check_settings("training", self.training)

    def _check_host(self, host: NetworkConfig) -> None:
        """That this can be a circuit of `host`, which a descendant is made like: before any is."""
        whole = shapes_of(host)
        if self.shapes.keys() != whole.keys():
            raise ValueError(f"shapes has {sorted(self.shapes.keys() ^ whole.keys())[:5]}, unlike host={host}.")
        for kernel in self.layout:
            own, full = (shapes[f"{kernel.conv}.weight"] for shapes in (self.shapes, whole))
            reads = own[1] == full[1] if kernel.reads == INPUT else own[1] <= full[1]
            if own[0] > full[0] or not reads or own[2:] != full[2:]:
                raise ValueError(f"shapes: {kernel.conv}.weight is {own}, which is no part of {full} of host={host}.")
        if (count := _count(whole)) != self.host_parameters:
            raise ValueError(f"host_parameters={self.host_parameters}, but host={host} has {count}.")
        if count > _MAX_PARAMETERS:
            raise ValueError(f"host={host} has {count} parameters, more than {_MAX_PARAMETERS}.")

    @property
    def num_parameters(self) -> int:
        """Of the circuit; running statistics are none."""
        return _count(self.shapes)

    @property
    def budget(self) -> float:
        """Which part of the host's kernels and norms the circuit is."""
        return self.num_parameters / self.host_parameters


class Circuit(OneFileArtefact):
    """A learngene of GTL: `config`, and `tensors` in fp32 on the CPU.

    Raises:
        CircuitError: tensors that are not those of the config, or not finite.
    """

    weights, key, what = (WEIGHTS,), "circuit", "a circuit"
    error = CircuitError
    template = "gtl"
    config: CircuitConfig

    @classmethod
    def extract(
        cls,
        network: nn.Module,
        sets: IndexSets,
        layout: Sequence[Kernel] | None = None,
        *,
        training: dict[str, Any] | None = None,
    ) -> "Circuit":
        """The circuit in these channels of a network.

        Args:
            sets: by index set of the layout; see `circuit.random_sets`, `circuit.largest_sets`.
            layout: the network's convolutions; that of a built-in network is known.
            training: for the description.

        Raises:
            ValueError: a network that is not as the layout says, or sets of other names or channels.
        """
        host = network.config if isinstance(network, ConvNet) and layout is None else None
        if layout is None and host is None:
            raise ValueError(f"layout=None, but a {type(network).__name__} is not built in: name its convolutions.")
        layout = layout_of(host) if host is not None else list(layout or [])
        state = network.state_dict()
        check_layout(state, layout)
        check_convolutions(network, layout)
        everything = {kernel.writes: torch.arange(len(state[f"{kernel.conv}.weight"])) for kernel in layout}
        if sets.keys() != everything.keys():
            raise ValueError(f"sets are of {sorted(sets)}, and the layout has {sorted(everything)}.")
        for name, members in sets.items():
            found, last = members.tolist(), len(everything[name]) - 1
            if not found or len(set(found)) < len(found) or not set(found) <= set(range(last + 1)):
                raise ValueError(f"sets[{name!r}]={found} must be different channels from 0 to {last}.")
        return cls.of(
            {name: tensor.clone() for name, tensor in extract(state, layout, sets).items()},
            layout,
            host,
            parameters(extract(state, layout, everything)),
            training=training,
        )

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        layout: Sequence[Kernel],
        host: NetworkConfig | None,
        host_parameters: int,
        *,
        training: dict[str, Any] | None = None,
    ) -> "Circuit":
        """A circuit of tensors as `circuit.extract` gives them."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(CircuitConfig(tuple(layout), shapes, host, host_parameters, training or {}), tensors)

    @property
    def sizes(self) -> dict[str, int]:
        """By index set, its number of channels."""
        return circuit_sizes(self.tensors, self.config.layout)

    def inherit_(self, network: nn.Module) -> None:
        """Write the circuit into the first channels of any network with the same modules, in place.

        Raises:
            ValueError: a network that is not as the layout says, or too narrow.
        """
        state = network.state_dict()
        check_layout(state, self.config.layout)
        check_convolutions(network, self.config.layout)
        inherit_(state, self.config.layout, self.tensors)

    def descend(
        self,
        num_classes: int,
        *,
        architecture: str | None = None,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> ConvNet:
        """A new network that has inherited the circuit; the rest and the head are random.

        Args:
            architecture: "vgg" or "resnet"; None, like the other two: the host's.
            widths, depths: of each stage; see `NetworkConfig`.
            seed: of the random weights.

        Warns if the circuit cannot do all there that it did in its host; see `translation`.

        Raises:
            ValueError: a network that cannot be or is too narrow, or a circuit of no built-in network.
        """
        host = self.config.host
        if host is None:
            raise ValueError("this circuit is of a network of its own: create one and call circuit.inherit_(network).")
        config = replace(
            host,
            architecture=architecture or host.architecture,
            widths=tuple(widths or host.widths),
            depths=tuple(depths or host.depths),
        )
        tensors, exact = translate(self.tensors, host, config)
        if not exact:
            warnings.warn(
                f"{config} has not room for all layers of {host}: the circuit is cut short there.", stacklevel=2
            )
        network = create_network(config, num_classes, seed=seed)
        inherit_(network.state_dict(), layout_of(config), tensors)
        return network

    @classmethod
    def read_config(cls, values: Any) -> CircuitConfig:
        """What `asdict` made JSON of."""
        values = exact_fields(CircuitConfig, values)
        if not isinstance(values["layout"], list) or not isinstance(values["shapes"], dict):
            raise ValueError("layout must be a list and shapes a dict.")
        if not all(isinstance(shape, list) for shape in values["shapes"].values()):
            raise ValueError("shapes must be lists of whole numbers.")
        values["layout"] = tuple(Kernel(**exact_fields(Kernel, kernel)) for kernel in values["layout"])
        values["shapes"] = {name: tuple(shape) for name, shape in values["shapes"].items()}
        if values["host"] is not None:
            values["host"] = NetworkConfig(**exact_fields(NetworkConfig, values["host"]))
        return CircuitConfig(**values)

    def card_metadata(self) -> dict[str, Any]:
        tags = ["learngene", "gtl", "safetensors"]
        return {"library_name": "diffusers-learngene", "pipeline_tag": "image-classification", "tags": tags}

    def card_variables(self) -> dict[str, Any]:
        config = self.config
        return {
            "host": config.host,
            "wider": [2 * width for width in config.host.widths] if config.host else None,
            "num_parameters": config.num_parameters,
            "host_parameters": config.host_parameters,
            "budget": config.budget,
            "training": config.training,
        }


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.endswith((".weight", ".bias")))
