# SPDX-License-Identifier: Apache-2.0
"""Files that say what they are: safetensors with a description, JSON, in their metadata; for every kind of artefact.

What a description has to hold is each kind's own. That it is there, that its keys are exactly those of a dataclass,
and that whatever is wrong with a file ends in the kind's own error with the path, is here.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write, write_tensors


__all__ = [
    "check_settings",
    "check_version",
    "described_file",
    "exact_fields",
    "finite_tensors",
    "read_tensors",
    "write_config",
    "write_described",
]

_SCALARS = (str, int, float, bool, type(None))


def write_described(path: Path, tensors: Mapping[str, Tensor], key: str, config: Any) -> None:
    """Write tensors with a dataclass as their description, atomically.

    Args:
        key: of the metadata; one entry, because safetensors writes several in any order.

    Raises:
        ValueError: a tensor holds NaN or infinity: such a file could not be read again.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds NaN or infinity, so {path.name} is not written.")
    write_tensors(path, tensors, {key: json.dumps(asdict(config))})


def write_config(folder: Path, config: Any) -> None:
    """Repeat a description in config.json, for readers and for the Hub's download counter."""
    text = json.dumps(asdict(config), indent=2)
    write(folder / "config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def described_file(path: Path, key: str, what: str, error: type[ValueError]) -> Iterator[tuple[Any, Any]]:
    """The values of a file's description, and the open file, whose header alone has been read.

    Args:
        what: the artefact with its article, such as "a gene".
        error: what every error of reading, and every ValueError that is raised inside, becomes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(key)
            if description is None:
                raise ValueError(f"a safetensors file without the description of {what}.")
            yield json.loads(description), file
    except (SafetensorError, OSError) as cause:
        raise error(f"{path} cannot be read as safetensors ({cause}): download or copy it again.") from cause
    except (ValueError, TypeError, RecursionError) as cause:
        raise error(f"{path} is not {what} that can be used: {cause}") from cause


def exact_fields(kind: Any, values: Any) -> dict[str, Any]:
    """The values of a dataclass; a ValueError unless they are a dict with exactly its keys."""
    names = {entry.name for entry in fields(kind)}
    if not isinstance(values, dict) or values.keys() != names:
        found = values.keys() if isinstance(values, dict) else {type(values).__name__}
        raise ValueError(f"the description of a {kind.__name__} lacks {names - found} and has {found - names}.")
    return dict(values)


def read_tensors(file: Any, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an open file; a ValueError unless they have these shapes and are finite numbers."""
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if found != expected:
        raise ValueError(f"it holds {found}, but its description asks for {expected}.")
    tensors = {name: file.get_tensor(name) for name in found}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, which is no floating-point type.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity.")
    return tensors


def finite_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Any], error: type[ValueError]
) -> dict[str, Tensor]:
    """The tensors in fp32 on the CPU; the error unless they have these shapes, and hold neither NaN nor infinity."""
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(shape) for name, shape in shapes.items()}
    if found != expected:
        raise error(f"the tensors have the shapes {found}, but the config says {expected}.")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise error(f"{name} holds NaN or infinity.")
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def check_version(found: object, known: int) -> None:
    """Raise a ValueError unless a file's format_version is the one that is known."""
    if type(found) is not int or found != known:
        raise ValueError(f"format_version={found!r} is not {known}: update diffusers-learngene.")


def check_settings(name: str, settings: Any) -> None:
    """Raise a ValueError unless these are settings: numbers, words, and lists of them, by name."""
    if not isinstance(settings, dict):
        raise ValueError(f"{name}={settings!r} must be a dict of settings.")
    for key, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, _SCALARS) or isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{name}[{key!r}]={value!r} must be a number, words, or a list of them.")
