# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: to a JSON-lines file, always, and to whatever tracker the user asks for."""

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)


__all__ = ["JSONLTracker", "available_cores", "check_processes", "create_accelerator"]


class JSONLTracker(GeneralTracker):
    """Appends one JSON object a line to a file, for `pandas.read_json(path, lines=True)`; no service, and crash-proof.

    The first line of a run is `{"config": {...}}`; the others have "step", "time" (seconds since 1970) and the logged
    values. A resumed run appends; a step that it repeats is there twice, and the later line counts.

    Args:
        path: The file. Its folders are made with the first line.
    """

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._append({"config": values})

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._append({"step": step, "time": round(time.time(), 3), **values})

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """What JSON does not know: numbers of torch and numpy as numbers, anything else (a path, say) as text."""
    return value.item() if hasattr(value, "item") else str(value)


def create_accelerator(
    project_name: str,
    *,
    output_dir: str | os.PathLike[str],
    config: dict[str, Any] | None = None,
    report_to: str | Sequence[str] = (),
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
) -> Accelerator:
    """An `Accelerator` as `training.loop.train` wants it, its trackers started.

    Args:
        project_name: The name of the run in the trackers.
        output_dir: `log.jsonl` is written there, the trackers' own files in its `logs` folder.
        config: What to record about the run, such as `vars(args)`.
        report_to: Trackers beside the JSON-lines file: "tensorboard", "wandb", "trackio", ... or several.
        mixed_precision: "no", "fp16", "bf16"; `None` leaves it to `accelerate launch`.
        gradient_accumulation_steps: Micro-steps per optimiser step.

    Raises:
        ValueError: For a tracker that is unknown or not installed, for fp16 on a CPU, and for processes that do not
            see each other.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"report_to={name!r} is not one of {sorted(str(known) for known in LOGGER_TYPE_TO_CLASS)}."
            )
        if name not in available:
            raise ValueError(f"report_to={name!r} is not installed: `pip install {name}`, or leave report_to out.")
    # Asked of torch, because an `Accelerator` that was refused would leave its precision to the next in the process.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu and (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise ValueError("mixed_precision='fp16' needs a GPU: on a CPU take 'bf16' or 'no'.")
    accelerator = Accelerator(
        log_with=[JSONLTracker(Path(output_dir, "log.jsonl")), *names],
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(Path(output_dir, "logs"))),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),  # an elastic student skips some in a step
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # others wait while one process encodes a data set
        ],
    )
    check_processes(accelerator)
    _use_all_cores(accelerator)
    settings = {key: value for key, value in (config or {}).items() if value is not None}  # TensorBoard refuses None
    accelerator.init_trackers(
        project_name, {key: v if isinstance(v, bool | str | int | float) else str(v) for key, v in settings.items()}
    )
    return accelerator


def _use_all_cores(accelerator: Accelerator) -> None:
    # On a machine without a GPU `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise: all cores but one
    # would idle. It always sets the other variable, which says that it, and not the user, asked for one thread.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and torch.get_num_threads() == 1:
        torch.set_num_threads(available_cores())


def available_cores() -> int:
    """Cores for this process, if those that a launcher started on this machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_processes(accelerator: Accelerator) -> None:
    """Raise when the launcher started several processes that each train alone and overwrite each other's files."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE={started}, but accelerate sees {accelerator.num_processes} process(es): each would train "
            "alone. Without a GPU, launch with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N script.py`; "
            "for one process, unset WORLD_SIZE."
        )
