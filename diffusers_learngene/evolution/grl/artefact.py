# SPDX-License-Identifier: Apache-2.0
"""The artefact of GRL: a gene, for any policy that has room for it.

    gene.safetensors      "0.weight", "0.bias", "5.mean.weight", ...: the tensors of two layers of one agent
    config.json, README.md

The description is in the metadata of gene.safetensors; config.json repeats it for readers and for the Hub's download
counter. Data only: nothing is ever unpickled, and nothing in a file names code, or a path.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...cards import card_images, render
from ...files import write
from ...hub import SharedArtefact
from .genes import inherit_


__all__ = ["Gene", "GeneConfig", "GeneError"]

FORMAT_VERSION = 1
WEIGHTS = "gene.safetensors"
_NAME = re.compile(r"(\d{1,3})\.(?:(?:mean|std)\.)?(?:weight|bias)")
_MAX_SIDE, _MAX_TENSORS = 2**16, 64
_SCALARS = (str, int, float, bool, type(None))


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
        ValueError: a value that cannot be; see `check`.
    """

    gene_type: list[int]
    shapes: dict[str, list[int]]
    environment: str | None = None
    tasks: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise a ValueError that names the attribute and its value, if one cannot be."""
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={self.format_version!r} is not 1: update diffusers-learngene.")
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
        found = set()
        for name, shape in self.shapes.items():
            match = _NAME.fullmatch(name)
            if not match or int(match[1]) not in layers:
                raise ValueError(f"shapes: {name!r} is not a tensor of the layers {layers}.")
            found.add(int(match[1]))
            sides = 2 if name.endswith("weight") else 1
            if (
                not isinstance(shape, list)
                or len(shape) != sides
                or any(type(side) is not int or not 1 <= side <= _MAX_SIDE for side in shape)
            ):
                raise ValueError(f"shapes[{name!r}]={shape!r} must be {sides} numbers from 1 to {_MAX_SIDE}.")
        if found != set(layers):
            raise ValueError(f"shapes={self.shapes!r} lacks tensors of the layers {sorted(set(layers) - found)}.")
        for key, value in {"environment": self.environment, "tasks": self.tasks, "training": self.training}.items():
            if not isinstance(value, {"tasks": list, "training": dict}.get(key, str | None)):
                raise ValueError(f"{key}={value!r} must be {'words' if key == 'environment' else 'a list or dict'}.")
        if any(not isinstance(task, str) for task in self.tasks):
            raise ValueError(f"tasks={self.tasks!r} must be words.")
        for key, value in self.training.items():
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, _SCALARS) or isinstance(item, float) and not math.isfinite(item):
                    raise ValueError(f"training[{key!r}]={value!r} must be a number, words, or a list of them.")


class Gene(SharedArtefact, library_name="diffusers-learngene", tags=["learngene", "grl", "safetensors"]):
    """Two layers of an agent: `config`, and `tensors` in fp32 on the CPU, by name.

    What is set in `card` (repo_id, results, images, license, commit: all optional) goes into the model card; images
    are paths of PNG files, and are copied beside it.

    Raises:
        GeneError: tensors that are not those of the config, or not finite.
    """

    weights = (WEIGHTS,)
    error = GeneError

    def __init__(self, config: GeneConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        self.card = {}
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != config.shapes:
            raise GeneError(f"the tensors have the shapes {shapes}, but the config says {config.shapes}.")
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise GeneError(f"{name} holds NaN or infinity.")

    def inherit_(self, policy: nn.Module, layers: Mapping[str, str] | None = None) -> list[str]:
        """Put the gene into a policy of torch, such as `model.policy` of stable-baselines3's PPO.

        Args:
            layers: the policy's module for every layer, by name; default: `genes.actor_layers(policy)`.

        Returns:
            A line for each tensor that has no place there, with the reason; nothing in its place was changed.
        """
        return inherit_(policy, self.tensors, layers)

    def write_data(self, folder: Path) -> None:
        description = asdict(self.config)
        metadata = {"gene": json.dumps(description)}
        write(folder / WEIGHTS, partial(save_file, self.tensors, metadata=metadata))
        text = json.dumps(description, indent=2)
        write(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read_data(cls, paths: dict[str, Path]) -> "Gene":
        return cls(*_read(paths[WEIGHTS]))

    def generate_model_card(self, *_: object, **card_kwargs: Any) -> ModelCard:
        """The model card from hub_cards/gene.md, with what is in `self.card`."""
        from ... import __version__

        card = {"version": __version__, **self.card, **{k: v for k, v in card_kwargs.items() if v is not None}}
        data = ModelCardData(
            library_name="stable-baselines3",
            license=card.get("license") or "apache-2.0",
            pipeline_tag="reinforcement-learning",
            tags=["learngene", "grl", "diffusers-learngene", "safetensors"],
        )
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        variables = asdict(self.config) | {"num_parameters": numbers} | card
        return ModelCard(render("gene", data, **variables | {"images": [p.name for p in card_images(card)]}))


def _read(path: Path) -> tuple[GeneConfig, dict[str, Tensor]]:
    """Config and tensors of a file, whose header is checked before a tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            config = _parse((file.metadata() or {}).get("gene"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            if shapes != config.shapes:
                raise GeneError(f"it holds {shapes}, but its description asks for {config.shapes}.")
            if kinds := {part.get_dtype() for part in slices.values()} - {"F16", "BF16", "F32", "F64"}:
                raise GeneError(f"it holds {sorted(kinds)}, which are no floating-point types.")
            return config, {name: file.get_tensor(name) for name in slices}
    except (SafetensorError, OSError) as error:
        raise GeneError(f"{path} cannot be read as safetensors ({error}): download or copy it again.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise GeneError(f"{path} is not a gene that can be used: {error}") from error


def _parse(description: str | None) -> GeneConfig:
    if description is None:
        raise GeneError("a safetensors file without the description of a gene.")
    values = json.loads(description)
    names = {entry.name for entry in fields(GeneConfig)}
    if not isinstance(values, dict) or values.keys() != names:
        found = values.keys() if isinstance(values, dict) else {type(values).__name__}
        raise GeneError(f"the description lacks {names - found} and has {found - names}.")
    return GeneConfig(**values)
