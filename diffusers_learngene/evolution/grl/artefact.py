# SPDX-License-Identifier: Apache-2.0
"""The artefact of GRL: a gene, for any policy that has room for it.

    gene.safetensors      "0.weight", "0.bias", "5.mean.weight", ...: the tensors of two layers of one agent
    config.json, README.md

The description is in the metadata of gene.safetensors; config.json repeats it for readers and for the Hub's download
counter. Data only: nothing is ever unpickled, and nothing in a file names code, or a path.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ...hub.descriptions import check_settings, check_version, exact_fields
from ...hub.shared import OneFileArtefact
from .genes import inherit_


__all__ = ["Gene", "GeneConfig", "GeneError"]

FORMAT_VERSION = 1
WEIGHTS = "gene.safetensors"
_NAME = re.compile(r"((0|[1-9]\d{0,2})(?:\.(?:mean|std))?)\.(weight|bias)", re.ASCII)
_MAX_SIDE, _MAX_TENSORS = 2**16, 64


class GeneError(ValueError):
    """A gene's file or folder that is incomplete, damaged, or none at all; the message names what is wrong."""


@dataclass(frozen=True)
class GeneConfig:
    """What a gene says about itself.

    Attributes:
        gene_type: the layers of the actor that it is of.
        shapes: of its tensors, by name.
        environment: gymnasium id of where it evolved.
        tasks: that its ancestors learned.
        training: the settings of the evolution: numbers, words, and lists of them.
        format_version: of this layout.

    Raises:
        ValueError: a value that cannot be.
    """

    gene_type: list[int]
    shapes: dict[str, list[int]]
    environment: str | None = None
    tasks: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_version(self.format_version, FORMAT_VERSION)
        layers = self.gene_type
        if (
            not isinstance(layers, list)
            or not layers
            or any(type(layer) is not int or not 0 <= layer < 1000 for layer in layers)
            or sorted(set(layers)) != layers
        ):
            raise ValueError(f"gene_type={layers!r} must be a list of layers, each once, in order, such as [0, 5].")
        if not isinstance(self.shapes, dict) or not 1 <= len(self.shapes) <= _MAX_TENSORS:
            raise ValueError(f"shapes={self.shapes!r} must hold 1 to {_MAX_TENSORS} shapes by name.")
        found, parts = set(), dict[str, dict[str, list[int]]]()
        for name, shape in self.shapes.items():
            match = _NAME.fullmatch(name)
            if not match or int(match[2]) not in layers:
                raise ValueError(f"shapes: {name!r} is not a tensor of the layers {layers}.")
            found.add(int(match[2]))
            parts.setdefault(match[1], {})[match[3]] = shape
            sides = 2 if name.endswith("weight") else 1
            if (
                not isinstance(shape, list)
                or len(shape) != sides
                or any(type(side) is not int or not 1 <= side <= _MAX_SIDE for side in shape)
            ):
                raise ValueError(f"shapes[{name!r}]={shape!r} must be {sides} numbers from 1 to {_MAX_SIDE}.")
        if found != set(layers):
            raise ValueError(f"shapes={self.shapes!r} lacks tensors of the layers {sorted(set(layers) - found)}.")
        for part, kinds in parts.items():
            if kinds.keys() != {"weight", "bias"} or kinds["weight"][:1] != kinds["bias"]:
                raise ValueError(f"shapes: {part} has {kinds}, not weights and as many biases as they have rows.")
        if not isinstance(self.environment, str | None):
            raise ValueError(f"environment={self.environment!r} must be a name or null.")
        if not isinstance(self.tasks, list) or any(not isinstance(task, str) for task in self.tasks):
            raise ValueError(f"tasks={self.tasks!r} must be a list of words.")
        check_settings("training", self.training)


class Gene(OneFileArtefact):
    """Two layers of an agent: `config`, and `tensors` in fp32 on the CPU, by name.

    Raises:
        GeneError: tensors that are not those of the config, or not finite.
    """

    weights, key, what = (WEIGHTS,), "gene", "a gene"
    error = GeneError
    template = "gene"
    config: GeneConfig

    def inherit_(self, policy: nn.Module, layers: Mapping[str, str] | None = None) -> list[str]:
        """Put the gene into a policy of torch, such as `model.policy` of stable-baselines3's PPO.

        Args:
            layers: the policy's module for every layer, by name; default: `genes.actor_layers(policy)`.

        Returns:
            A line for each layer that has no place there, with the reason; nothing in its place was changed.

        Raises:
            ValueError: no layer has a place, or the policy's actor cannot be told from its critic: name its `layers`.
        """
        return inherit_(policy, self.tensors, layers)

    @classmethod
    def read_config(cls, values: Any) -> GeneConfig:
        return GeneConfig(**exact_fields(GeneConfig, values))

    def card_metadata(self) -> dict[str, Any]:
        tags = ["learngene", "grl", "diffusers-learngene", "safetensors"]
        return {"library_name": "stable-baselines3", "pipeline_tag": "reinforcement-learning", "tags": tags}

    def card_variables(self) -> dict[str, Any]:
        return asdict(self.config) | {"num_parameters": sum(tensor.numel() for tensor in self.tensors.values())}
