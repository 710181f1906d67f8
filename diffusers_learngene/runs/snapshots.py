# SPDX-License-Identifier: Apache-2.0
"""Snapshots of an evolution between two generations: whole, or not there.

`output_dir/checkpoint-<generation>` holds `population.safetensors` and `state.json`. A run that resumes from it goes
on as the run would have that was never interrupted. Nothing random needs saving, because every draw comes from a
generator seeded by (seed, generation, what for): `training.sampler.seeded_generator`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoints import check_signature, damaged, finish


__all__ = ["load_snapshot", "save_snapshot"]

STATE_FILE, TENSOR_FILE = "state.json", "population.safetensors"


def save_snapshot(
    output_dir: str | os.PathLike[str],
    generation: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    total_limit: int | None = 1,
) -> Path:
    """Write `output_dir/checkpoint-<generation>`, then delete the oldest until `total_limit` are left.

    Called on one process, while no other reads there.

    Args:
        generation: how many are complete.
        state: JSON data; "signature" in it is what `load_snapshot` compares.
    """
    path = Path(output_dir, f"checkpoint-{generation}")
    unfinished = path.with_name(f"tmp-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / TENSOR_FILE)
    (unfinished / STATE_FILE).write_text(json.dumps(dict(state)), encoding="utf-8")
    finish(unfinished, path, total_limit)
    return path


def load_snapshot(path: Path, signature: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state as `save_snapshot` was given them.

    Args:
        signature: JSON data that has to equal `state["signature"]`: the settings under which the run goes on as it
            would have.

    Raises:
        ValueError: for a snapshot that is damaged, or of a run with other settings.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSOR_FILE)
        then = dict(state["signature"])
    except Exception as error:  # whatever json and safetensors raise for a file cut short
        raise ValueError(damaged(path, error)) from error
    check_signature(path, then, json.loads(json.dumps(dict(signature))))
    return tensors, state
