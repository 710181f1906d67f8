# SPDX-License-Identifier: Apache-2.0
"""Numbers with what they need to be believed: the command, the seed, the machine, the versions and the commit."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..hub.files import write


__all__ = ["format_cell", "format_table", "mean_curves", "mean_rows", "provenance", "write_json"]


def provenance() -> dict[str, Any]:
    """Command, commit (with "+" if there are uncommitted changes; None outside a checkout), machine and versions.

    The value of `--hub_token`, or of any other token, is left out of the command.
    """
    packages = ("diffusers-learngene", "torch", "diffusers", "transformers", "peft", "accelerate")
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return {
        "command": re.sub(r"(--\w*token[= ])\S+", r"\1...", command),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Write JSON such that a reader never sees half of it."""
    text = json.dumps(values, indent=2) + "\n"
    write(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A plain-text table; numbers get three digits after the point and stand on the right, a dash for None."""
    cells = [list(columns)] + [[format_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def format_cell(value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def mean_rows(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tables of several runs as one: of numbers after a point the mean and half their range, as a text."""
    return [{key: _mean([row[key] for row in same]) for key in same[0]} for same in zip(*runs, strict=True)]


def _mean(values: Sequence[Any]) -> Any:
    if not all(isinstance(value, float) for value in values) or len(set(values)) == 1:
        return values[0]
    return f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def mean_curves(
    runs: Sequence[Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]],
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Curves of several runs, by panel and series, as one: the means."""
    return {
        title: {
            name: [
                (points[0][0], sum(y for _, y in points) / len(points))
                for points in zip(*(run[title][name] for run in runs), strict=True)
            ]
            for name in series
        }
        for title, series in runs[0].items()
    }
