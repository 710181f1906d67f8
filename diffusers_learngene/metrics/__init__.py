# SPDX-License-Identifier: Apache-2.0
"""Metrics as modules of `evaluate`, shipped with the package: `evaluate.load` by a bare name would ask the Hub.

Here lives one folder a metric, laid out as a Space of a metric on the Hub (`fid/fid.py`, README.md, requirements.txt),
and `features`, what they are computed of. Not here: when a run measures what (`training/`).
"""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import evaluate


__all__ = ["load"]


def load(name: str) -> "evaluate.EvaluationModule":
    """The metric `name`, for instance `load("fid").compute(predictions=..., reference_features=...)`.

    Raises:
        ValueError: For a name that is not shipped.
    """
    folder = Path(str(files(__name__)))
    known = sorted(path.parent.name for path in folder.glob("*/*.py") if path.stem == path.parent.name)
    if name not in known:
        raise ValueError(f"name={name!r} is not one of the metrics {known}; evaluate.load({name!r}) looks on the Hub.")
    import evaluate

    return evaluate.load(str(folder / name / f"{name}.py"))
