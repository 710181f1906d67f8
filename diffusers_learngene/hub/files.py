# SPDX-License-Identifier: Apache-2.0
"""What all artefacts need of files and of the Hub: whole or not there, and nothing fetched but what belongs to one."""

import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from torch import Tensor


HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def hub_id(name: str | os.PathLike[str] | None) -> str | None:
    """`name` if it is a Hub id, "org/name"; None for a folder, whose path is nobody's business."""
    return str(name) if name and HUB_ID.fullmatch(str(name)) and not Path(name).exists() else None


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write through a temporary file in the same folder: at any moment `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so."""
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write(path, lambda temporary: save_file(stored, temporary, metadata=metadata))


def local_folder(
    name: str | os.PathLike[str],
    allow_patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder `name`, or a download of the files of these patterns from the repository of that name on the Hub;
    without a network, as it was last downloaded.

    Raises:
        HFValidationError: `name` can be neither. The other errors of `huggingface_hub` come as they are.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        download = snapshot_download(
            str(name),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(allow_patterns),
        )
    except HFValidationError as error:
        raise HFValidationError(f"{str(name)!r} is neither a folder nor the id of a repository.") from error
    return Path(download)
