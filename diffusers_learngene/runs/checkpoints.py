# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints that are whole or not there.

`output_dir/checkpoint-<step>` holds what accelerate saves (weights, optimiser, random states of each process), the
moving average in `ema.safetensors`, and `trainer_state.json`: the step, the learning-rate schedule, the run's
signature and its history. All of it is written to `tmp-checkpoint-<step>` first and renamed when complete; deleting
renames first, too. So a process killed at any moment leaves the last good checkpoint, and folders whose name starts
with `tmp-` never count.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset


__all__ = [
    "check_signature",
    "damaged",
    "describe_samples",
    "digest",
    "finish",
    "list_checkpoints",
    "load_checkpoint",
    "resolve_checkpoint",
    "save_checkpoint",
]

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"

MAX_DIGESTED = 2048  # samples of a data set


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints in `output_dir`, by step."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def resolve_checkpoint(output_dir: str | os.PathLike[str], resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from, or `None` to start anew.

    Args:
        output_dir: Where the checkpoints of this training are.
        resume_from_checkpoint: "latest" (the last one in `output_dir`, if there is one), the path of a checkpoint, the
            name of one in `output_dir`, or `None`.

    Raises:
        ValueError: When there is no such checkpoint; and when there are checkpoints, but nothing was said about them.
    """
    existing = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if existing:
            raise ValueError(
                f"output_dir={str(output_dir)!r} already holds {existing[-1].name}: resume_from_checkpoint='latest' "
                "continues it; to start anew take another output_dir, or delete the checkpoints."
            )
        return None
    if resume_from_checkpoint == "latest":
        return existing[-1] if existing else None
    for path in (Path(resume_from_checkpoint), Path(output_dir, resume_from_checkpoint)):
        if path.is_dir():
            return path
    names = [path.name for path in existing] or "no checkpoints"
    raise ValueError(
        f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder, nor is it one in {str(output_dir)!r}, "
        f"where there are {names}; 'latest' takes the last of them."
    )


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    state: dict[str, Any],
    names: Sequence[str] = (),
    *,
    ema: EMAModel | None = None,
    total_limit: int | None = None,
) -> Path:
    """Write `output_dir/checkpoint-<state["step"]>`; called on every process, after which at most `total_limit` are
    left.

    Args:
        state: JSON data; "step" names the checkpoint.
        names: Of the trained parameters.
        ema: Their moving average, in the same order.
        total_limit: Checkpoints to keep, this one included; the oldest go, once this one is in place.
    """
    path = Path(output_dir, f"checkpoint-{state['step']}")
    unfinished = path.with_name(f"tmp-{path.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    if accelerator.is_main_process:
        if ema is not None:
            tensors = zip(names, ema.shadow_params, strict=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors}, unfinished / EMA_FILE)
        (unfinished / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(unfinished, path, total_limit)
    accelerator.wait_for_everyone()
    return path


def finish(unfinished: Path, path: Path, total_limit: int | None) -> None:
    """Make a complete folder the checkpoint `path`, then delete the oldest ones until `total_limit` are left.

    Its files are on the disk before the others go: a machine that loses its power loses no checkpoint either.
    """
    for file in unfinished.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
    _discard(path)
    unfinished.rename(path)
    others = [other for other in list_checkpoints(path.parent) if other != path]
    for other in others[: max(0, len(others) + 1 - total_limit)] if total_limit else []:
        _discard(other)


def _discard(path: Path) -> None:
    """Delete a checkpoint such that it is never seen half deleted."""
    if path.exists():
        doomed = path.with_name(f"tmp-deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    signature: Mapping[str, Any],
    names: Sequence[str],
    *,
    ema: EMAModel | None = None,
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into the prepared objects, and return its `state`; called on every process.

    Args:
        signature: Must equal `state["signature"]`: what has to be the same for the training to go on as it would have.
        names: Of the trained parameters.
        ema: Their moving average, in the same order.

    Raises:
        ValueError: For a checkpoint that is damaged, or of another training.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        then = dict(state["signature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(damaged(path, error)) from error
    check_signature(path, then, signature)
    try:
        with safe_open(path / SAFE_WEIGHTS_NAME, "pt") as file:
            if absent := set(names) - set(file.keys()):
                raise KeyError(*sorted(absent)[:3])
        # Not strict: of tensors without elements (weights that an adapter generates) accelerate saves the first only.
        accelerator.load_state(str(path), strict=False)
        if ema is not None:
            shadow = load_file(path / EMA_FILE)
            for name, tensor in zip(names, ema.shadow_params, strict=True):
                tensor.copy_(shadow[name])
            ema.optimization_step = state["step"]
    except Exception as error:  # whatever torch, safetensors and accelerate raise for a file cut short
        raise ValueError(damaged(path, error)) from error
    return state


def check_signature(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what is set now and was set otherwise when the checkpoint was written."""
    before, after = _leaves(then), _leaves(now)
    if changed := [key for key in {**after, **before} if before.get(key) != after.get(key)]:
        changes = ", ".join(f"{key}={after.get(key)!r} (there {before.get(key)!r})" for key in changed)
        raise ValueError(
            f"resume_from_checkpoint={str(path)!r} is of a training with other settings than {changes}: give the same "
            f"ones, start anew in another output_dir, or delete {str(path.parent)!r} to do this part of it anew."
        )


def _leaves(signature: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by name, those of dicts as "dict.key", and as JSON gives them back."""
    found: dict[str, Any] = {}
    for key, value in signature.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return found


def digest(values: Iterable[tuple[str, Any]]) -> str:
    """A short text that changes with any name, and any tensor's dtype, shape or bytes, but not with their order.

    It takes a second per gigabyte.

    Args:
        values: by name, such as `state_dict().items()`: tensors and arrays on any device, and of other things what
            `repr` shows.
    """
    parts = []
    for name, value in values:
        tensor = torch.as_tensor(value) if isinstance(value, Tensor | np.ndarray) else None
        head = repr(value) if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        part = hashlib.sha256(repr((name, head)).encode())
        if tensor is not None:
            part.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        parts.append(part.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def describe_samples(dataset: Dataset[Any]) -> dict[str, Any]:
    """For a signature: how many samples a data set of dicts has, their shapes, and a digest of them.

    Of more than 2,048, the digest is that of so many, evenly spread, because decoding those takes seconds already.
    """
    length = len(dataset)  # type: ignore[arg-type]
    count = min(length, MAX_DIGESTED)
    chosen = [index * length // count for index in range(count)]
    shapes = {key: list(getattr(value, "shape", ())) for i in chosen[:1] for key, value in dataset[i].items()}
    content = digest((f"{i} {key}", value) for i in chosen for key, value in dataset[i].items())
    return {"samples": length, "shapes": shapes, "digest": content}


def damaged(path: Path, error: Exception) -> str:
    """What to say of a checkpoint that cannot be read."""
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (
        f"resume_from_checkpoint={str(path)!r} cannot be read ({cause}). "
        + (f"Resume from one of {others} beside it, or start" if others else "Start")
        + " anew in another output_dir."
    )
