# SPDX-License-Identifier: Apache-2.0
"""Seconds of several ways to do one thing, which take turns: whatever else the machine does hits them alike."""

import time
from collections.abc import Callable, Mapping

import torch


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one run; of an accelerator's, to the end of its work."""
    wait = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every side in every round, the order turned round each time; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            seconds[name].append(seconds_of(sides[name], device))
    return {name: values[1:] for name, values in seconds.items()}
