# SPDX-License-Identifier: Apache-2.0
"""Descendants of a learngene beside what else one could have started from, on the same data for the same steps.

    learngene   descend, train the scalers, merge, train all: evaluated from step 0, before any training
    scratch     the class's own initialisation
    selection   layers and elements of the ancestry (`initializers.selection`), the best of three residual gains

All see the same batches with the same noise, and each is trained at the rate that suits it. The results are a table,
a JSON file with everything needed to repeat them, curves, and a grid of samples.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from ..functional.resize import DepthInit
from ..initializers import scratch, selection
from ..learngene import Learngene
from ..models import enable_gradient_checkpointing_, model_config
from .loop import TrainingOptions, train
from .plots import curves, image_grid
from .report import format_cell, format_table, provenance, write_json
from .tasks import Task


__all__ = ["Comparison"]

GRID_COLUMNS = 10  # samples of a model that are shown


class Comparison:
    """Runs the comparison one size at a time, then reports.

    Args:
        options: of a whole run; learning rate and steps are replaced for each part.
        output_dir: models/ (every trained descendant, a plain model), results.json, curves.png and samples.png go
            here.
        scaler_steps: of `options.max_train_steps`, those on the scalers alone.
        scaler_learning_rate, finetune_learning_rate, scratch_learning_rate: of the scalers, of what starts from
            trained weights, and of what starts from random ones.
        num_samples: images for the Frechet distance of each model.
        gradient_checkpointing: recompute every block in the backward pass.
        trained_ancestry: whether the ancestry knows anything that one could select.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        ancestry: nn.Module,
        learngene: Learngene,
        options: TrainingOptions,
        *,
        output_dir: str,
        scaler_steps: int,
        scaler_learning_rate: float,
        finetune_learning_rate: float,
        scratch_learning_rate: float,
        num_samples: int,
        gradient_checkpointing: bool = False,
        trained_ancestry: bool = True,
    ) -> None:
        self.accelerator, self.task, self.ancestry, self.learngene = accelerator, task, ancestry, learngene
        self.options, self.output_dir, self.num_samples = options, Path(output_dir), num_samples
        self.scaler_steps, self.scaler_learning_rate = scaler_steps, scaler_learning_rate
        self.finetune_learning_rate, self.scratch_learning_rate = finetune_learning_rate, scratch_learning_rate
        self.gradient_checkpointing, self.trained_ancestry = gradient_checkpointing, trained_ancestry
        steps = options.max_train_steps
        self.eval_steps = sorted({0, *(round(steps * part) for part in (1 / 8, 1 / 4, 1 / 2)), scaler_steps, steps})
        self.rows: list[dict[str, Any]] = []
        self.panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.grid: dict[str, Tensor] = {}
        ancestry.to(accelerator.device).eval()
        real = task.real_samples(GRID_COLUMNS)
        if real is not None:
            self.grid["real"] = real
        if trained_ancestry:
            row = self._record("ancestry", "ancestry", ancestry, {0: task.evaluate(ancestry)})
            row["frechet"] = self._sample("ancestry", ancestry)

    def run(self, overrides: dict) -> None:
        """Compare at one size, given as config overrides."""
        name = _name(overrides)
        title = name if self.learngene.seen(overrides) else f"{name} (never seen)"

        descendant = self.learngene.descend(**overrides)
        untrained = self._sample(f"{name}: learngene, untrained", descendant)
        history = self._train(descendant, f"{name} scalers", self.scaler_steps, self.scaler_learning_rate)
        model = descendant.merge_and_unload().requires_grad_(True)
        rest = self.options.max_train_steps - self.scaler_steps
        if rest:
            history |= self._train(model, f"{name} learngene", rest, self.finetune_learning_rate, self.scaler_steps)
        row = self._record("learngene", title, model, history)
        self._save(model, name)
        row |= {"frechet@0": untrained, "frechet": self._sample(f"{name}: learngene", model)}

        others = [("scratch", scratch(self.ancestry, overrides, seed=self.options.seed), self.scratch_learning_rate)]
        if self.trained_ancestry:
            others.append(("selection", self._best_selection(overrides), self.finetune_learning_rate))
        for start, model, rate in others:
            history = self._train(model, f"{name} {start}", self.options.max_train_steps, rate)
            row = self._record(start, title, model, history)
            row["frechet"] = self._sample(f"{name}: {start}", model)

    def ablate_sigma_init(self, overrides: dict, learning_rate: float) -> None:
        """Compare every start that the scalers of a size can have, before and while only they are trained.

        For half as many steps as other rows have, because there are five of these.
        """
        name, steps = _name(overrides), self.options.max_train_steps // 2
        for how in get_args(DepthInit):
            descendant = self.learngene.descend(sigma_init=how, **overrides)
            history = self._train(descendant, f"{name} sigma {how}", steps, learning_rate)
            self._record(how, f"{name}, sigma only", descendant, history)

    def report(self) -> dict[str, Any]:
        """Print the table, write results.json, curves.png and samples.png, and return the results."""
        results = {
            "rows": self.rows,
            "num_samples": self.num_samples,
            "seed": self.options.seed,
            "learngene": {"parameters": self.learngene.num_parameters, "ancestry": self.learngene.ancestry_parameters},
            **provenance(),
        }
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / "results.json", results)
            curves(self.panels, self.output_dir / "curves.png", log_y=True)
            if self.grid:
                classes = [self.task.class_names[i % len(self.task.class_names)] for i in range(GRID_COLUMNS)]
                image_grid(self.grid, self.output_dir / "samples.png", column_labels=classes)
            own, all_of_it = self.learngene.num_parameters, self.learngene.ancestry_parameters
            print(f"\nlearngene: {own:,} parameters, {own / all_of_it:.0%} of the ancestry's {all_of_it:,}")
            frechet = f"; Frechet distance of {self.num_samples} samples (lower is better)" if self.grid else ""
            print(f"validation by training step{frechet}\n")
            print(format_table(self.rows, self._columns()))
        return results

    def card(self, repo_id: str | None = None) -> dict[str, Any]:
        """What the learngene's card says of these results."""
        rows = [{column: format_cell(row.get(column)) for column in self._columns()} for row in self.rows]
        images = [self.output_dir / name for name in ("curves.png", *(["samples.png"] if self.grid else []))]
        return {"repo_id": repo_id, "results": rows, "images": images, "commit": provenance()["commit"]}

    def _columns(self) -> list[str]:
        """Of the table: those that any row has a value for."""
        losses = [f"val_loss@{step}" for step in self.eval_steps]
        accuracies = [f"accuracy@{step}" for step in (self.eval_steps[0], self.eval_steps[-1])]
        columns = ["size", "start", "parameters", *losses, *accuracies, "frechet@0", "frechet"]
        return [column for column in columns if any(row.get(column) is not None for row in self.rows)]

    def _train(
        self, model: nn.Module, name: str, steps: int, learning_rate: float, offset: int = 0
    ) -> dict[int, dict[str, float]]:
        """Train and return the numbers on the validation images by step, counted from `offset`."""
        if not steps:
            return {offset: self.task.evaluate(model.to(self.accelerator.device).eval())}
        if self.gradient_checkpointing:
            enable_gradient_checkpointing_(model.get_base_model() if isinstance(model, PeftModel) else model)
        options = replace(
            self.options,
            max_train_steps=steps,
            learning_rate=learning_rate,
            lr_warmup_steps=min(self.options.lr_warmup_steps, steps // 10),
        )
        history = train(
            self.accelerator,
            model,
            lambda module, batch, generator, step: self.task.loss(module, batch, generator),
            self.task.train_data,
            options,
            output_dir=str(self.output_dir / "checkpoints" / name.replace(" ", "-")),
            name=name,
            evaluate=lambda step: self.task.evaluate(model),
            eval_steps=[step - offset for step in self.eval_steps if 0 <= step - offset <= steps],
        )
        return {int(record["step"]) + offset: record for record in history if "val_loss" in record}

    def _best_selection(self, overrides: dict) -> nn.Module:
        """The strongest start by selection: no gain, the ratio of depths, or its root, by validation loss."""
        key = next(iter(overrides))
        ratio = model_config(self.ancestry)[key] / overrides[key]
        candidates = [selection(self.ancestry, overrides, gain=gain) for gain in sorted({1.0, ratio, ratio**0.5})]
        for candidate in candidates:
            candidate.to(self.accelerator.device).eval()
        return min(candidates, key=lambda candidate: self.task.evaluate(candidate)["val_loss"])

    def _record(self, start: str, size: str, model: nn.Module, history: dict[int, dict[str, float]]) -> dict[str, Any]:
        """Add a row to the table and a curve to the picture."""
        row: dict[str, Any] = {"size": size, "start": start, "parameters": sum(p.numel() for p in model.parameters())}
        for step, values in sorted(history.items()):
            row |= {f"{key}@{step}": value for key, value in values.items() if key in ("val_loss", "accuracy")}
        self.rows.append(row)
        if start != "ancestry":
            points = [(step, values["val_loss"]) for step, values in sorted(history.items())]
            self.panels.setdefault(size, {})[start] = points
        return row

    def _sample(self, name: str, model: nn.Module) -> float | None:
        """Samples for the grid, and their Frechet distance; None where the task makes no images."""
        images = self.task.samples(model, self.num_samples)
        if images is None:
            return None
        self.grid[name] = images[:GRID_COLUMNS]
        return self.task.frechet_distance(images)

    def _save(self, model: nn.Module, name: str) -> None:
        """The trained descendant as a plain model folder."""
        if self.accelerator.is_main_process:
            model.save_pretrained(self.output_dir / "models" / name.replace(" ", "-"))  # type: ignore[operator]


def _name(overrides: dict) -> str:
    return " ".join(f"{key.removeprefix('num_')}={value}" for key, value in overrides.items())
