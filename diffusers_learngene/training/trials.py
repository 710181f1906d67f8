# SPDX-License-Identifier: Apache-2.0
"""Models trained one after the other on the same data for the same steps, and their table, curves and samples."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from ..anatomy.belongings import Belongings
from ..anatomy.models import enable_gradient_checkpointing_
from ..learngene.descendants import save_model
from ..runs.loop import TrainingOptions, train
from ..runs.plots import curves, image_grid
from ..runs.report import format_cell, format_table, provenance, write_json
from .tasks import Task, signature_of


__all__ = ["GRID_COLUMNS", "NOTHING", "Trials", "evaluation_steps"]

NOTHING = Belongings()

GRID_COLUMNS = 10  # samples of a model that are shown

History = dict[int, dict[str, float]]  # numbers on the validation images by training step


def evaluation_steps(steps: int, *others: int) -> list[int]:
    """When to look at a training of so many steps: at its start, more and more rarely, and at its end."""
    return sorted({0, *(round(steps * part) for part in (1 / 8, 1 / 4, 1 / 2)), *others, steps})


class Trials:
    """What trainings are compared by: every one is a row of the table, a curve, and a row of samples.

    All see the same batches with the same noise, and each is trained at the rate that suits it.

    Args:
        options: of a whole training; learning rate and steps are replaced for each.
        output_dir: models/ (trained models, plain ones), results.json, curves.png and samples.png go here.
        eval_steps: of a whole training.
        num_samples: images for the Frechet distance of each model.
        gradient_checkpointing: recompute every block in the backward pass.
        belongings: to all of the models, which are saved with them.
    """

    first_columns: Sequence[str] = ()  # of the table: those before and after the numbers by step
    last_columns: Sequence[str] = ("frechet",)

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        options: TrainingOptions,
        *,
        output_dir: str,
        eval_steps: Sequence[int],
        num_samples: int,
        gradient_checkpointing: bool = False,
        belongings: Belongings = NOTHING,
    ) -> None:
        self.belongings = belongings
        self.accelerator, self.task, self.options = accelerator, task, options
        self.output_dir, self.eval_steps, self.num_samples = Path(output_dir), list(eval_steps), num_samples
        self.gradient_checkpointing = gradient_checkpointing
        self.rows: list[dict[str, Any]] = []
        self.panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.grid: dict[str, Tensor] = {}
        real = task.real_samples(GRID_COLUMNS)
        if real is not None:
            self.grid["real"] = real

    def train(
        self,
        model: nn.Module,
        name: str,
        steps: int,
        learning_rate: float,
        offset: int = 0,
        *,
        task: Task | None = None,
        param_groups: Sequence[dict[str, Any]] | None = None,
        eval_steps: Collection[int] | None = None,
    ) -> History:
        """Train and return the numbers on the validation images by step, counted from `offset`.

        Args:
            task: another one's loss, data and validation images than the trials'.
            param_groups: for AdamW; default: all that is trainable, in one.
            eval_steps: when; default: as the trials are.
        """
        task = task or self.task
        if not steps:
            return {offset: task.evaluate(model.to(self.accelerator.device).eval())}
        if self.gradient_checkpointing:
            enable_gradient_checkpointing_(model.get_base_model() if isinstance(model, PeftModel) else model)
        options = replace(
            self.options,
            max_train_steps=steps,
            learning_rate=learning_rate,
            lr_warmup_steps=min(self.options.lr_warmup_steps, steps // 10),
        )
        wanted = self.eval_steps if eval_steps is None else eval_steps
        history = train(
            self.accelerator,
            model,
            lambda module, batch, generator, step: task.loss(module, batch, generator),
            task.train_data,
            options,
            output_dir=str(self.output_dir / "checkpoints" / name.replace(" ", "-")),
            name=name,
            param_groups=param_groups,
            evaluate=lambda step: task.evaluate(model),
            eval_steps=[step - offset for step in wanted if 0 <= step - offset <= steps],
            signature=signature_of(task, model),
        )
        return {int(record["step"]) + offset: record for record in history if "val_loss" in record}

    def record(self, row: dict[str, Any], history: History, panel: str | None, series: str) -> dict[str, Any]:
        """Add a row to the table, and a curve to the panel of that title, if there is to be one."""
        for step, values in sorted(history.items()):
            row |= {f"{key}@{step}": value for key, value in values.items() if key in ("val_loss", "accuracy")}
        self.rows.append(row)
        if panel is not None:
            points = [(step, values["val_loss"]) for step, values in sorted(history.items())]
            self.panels.setdefault(panel, {})[series] = points
        return row

    def sample(self, name: str, model: nn.Module) -> float | None:
        """Samples for the grid, and their Frechet distance; None where the task makes no images."""
        images = self.task.samples(model, self.num_samples)
        if images is None:
            return None
        self.grid[name] = images[:GRID_COLUMNS]
        return self.task.frechet_distance(images)

    def save(self, model: nn.Module, name: str) -> None:
        """A trained model as a plain model folder, with what belongs to it."""
        if self.accelerator.is_main_process:
            save_model(model, self.output_dir / "models" / name.replace(" ", "-"), self.belongings)

    def columns(self) -> list[str]:
        """Of the table: those that any row has a value for."""
        losses = [f"val_loss@{step}" for step in self.eval_steps]
        accuracies = [f"accuracy@{step}" for step in (self.eval_steps[0], self.eval_steps[-1])]
        columns = (*self.first_columns, *losses, *accuracies, *self.last_columns)
        return [column for column in columns if any(row.get(column) is not None for row in self.rows)]

    def table(self) -> str:
        return format_table(self.rows, self.columns())

    def write(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write results.json, with the rows, curves.png and samples.png; return the results."""
        results = {
            "rows": self.rows,
            "num_samples": self.num_samples,
            "seed": self.options.seed,
            **results,
            **provenance(),
        }
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / "results.json", results)
            curves(self.panels, self.output_dir / "curves.png", log_y=True)
            if self.grid:
                image_grid(self.grid, self.output_dir / "samples.png", column_labels=self._column_labels())
        return results

    def _column_labels(self) -> list[str]:
        names = [name.partition(",")[0] for name in self.task.class_names]  # of synonyms the first
        return [names[i % len(names)] for i in range(GRID_COLUMNS)]

    def card(self) -> dict[str, Any]:
        """What the learngene's card says of these results."""
        columns = self.columns()
        rows = [{column: format_cell(row.get(column)) for column in columns} for row in self.rows]
        images = [self.output_dir / name for name in ("curves.png", *(["samples.png"] if self.grid else []))]
        return {"results": rows, "images": images, "commit": provenance()["commit"]}
