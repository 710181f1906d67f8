# SPDX-License-Identifier: Apache-2.0
"""Ways to teach a class-conditional model new classes, beside each other on the same data for the same steps.

    kind      learngenes frozen; new tailors and new label rows (`Learngene.descend(num_new_classes=)`)
    lora, pissa, oft
              PEFT's own adapters of a plainly pre-trained model, and new label rows
    full      all of that model
    scratch   a new model, on the new classes alone

Adapters have about as many trainable parameters as the tailors: of the ranks that there are, the one that comes
nearest. All see the same batches with the same noise, each at the rate that suits it.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from ..anatomy.belongings import Belongings
from ..anatomy.dit import LabelInit, join_label_rows_, train_label_rows_
from ..learngene import Learngene
from ..runs.loop import TrainingOptions
from ..runs.plots import image_grid
from ..runs.report import format_table, mean_curves, mean_rows
from ..tuners.kind import class_gate
from .diffusion_task import DiffusionTask
from .trials import NOTHING, Trials, evaluation_steps
from .ways import Adapter, add_adapter, count_flops, count_parameters, with_classes


__all__ = ["Adaptation", "combine"]

EACH = 3  # samples of a class with the same tailors, in the picture


class Adaptation(Trials):
    """Pre-trains, runs one way to adapt after the other, takes KIND apart, then reports.

    Args:
        base, novel: the tasks of the base and the novel classes; `novel` knows the labels of both.
        options: of the pre-training; the learning rate is replaced for each way to adapt.
        adapt_train_steps: of each way.
        output_dir, num_samples, gradient_checkpointing, belongings: as `Trials` has them. tailors.png goes there, too.
        prefix: of names of trainings, where there are several of the same kind.
    """

    first_columns = ("way", "trainable")
    last_columns = ("frechet", "base_before", "base_after", "parameters", "MFLOPs")
    model_columns = ("model", "parameters", "MFLOPs", "base_val_loss", "novel_val_loss", "class_val_loss")

    def __init__(
        self,
        accelerator: Accelerator,
        base: DiffusionTask,
        novel: DiffusionTask,
        options: TrainingOptions,
        *,
        adapt_train_steps: int,
        output_dir: str,
        num_samples: int,
        gradient_checkpointing: bool = False,
        prefix: str = "",
        belongings: Belongings = NOTHING,
    ) -> None:
        super().__init__(
            accelerator,
            novel,
            options,
            output_dir=output_dir,
            eval_steps=evaluation_steps(adapt_train_steps),
            num_samples=num_samples,
            gradient_checkpointing=gradient_checkpointing,
            belongings=replace(belongings, small=replace(belongings.small, **novel.companions)),
        )
        self.base, self.novel, self.steps, self.prefix = base, novel, adapt_train_steps, prefix
        self.models: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}  # for results.json
        # What this distance is between real images of these classes.
        self.rows.append({"way": "training images", "frechet": novel.frechet_distance(novel.training_images())})

    # Training

    def pretrain(self, model: nn.Module, name: str) -> None:
        """Train a model on the base classes, in place; note it, and save it if it is a plain one."""
        steps = self.options.max_train_steps
        rate = self.options.learning_rate
        self.train(model, f"{self.prefix}pretrain {name}", steps, rate, task=self.base, eval_steps=[steps])
        self.note(name, model, "base_val_loss", "class_val_loss")
        if not isinstance(model, PeftModel):
            self.save(model, name)

    def adapt(
        self,
        way: str,
        model: nn.Module,
        learning_rate: float,
        param_groups: Sequence[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Train a model on the novel classes, in place; returns its row of the table."""
        trainable = count_parameters(model, trainable=True)
        row = {"way": way, "trainable": trainable, "learning_rate": learning_rate}
        history = self.train(model, f"{self.prefix}adapt {way}", self.steps, learning_rate, param_groups=param_groups)
        # Scratch starts so far above that the curves of the others would lie on one another.
        row = self.record(row, history, None if way == "scratch" else "novel classes", way)
        row["frechet"] = self.sample(way, model)
        return row

    def adapt_plain(
        self, way: str, model: nn.Module, learning_rate: float, num_parameters: int, label_init: LabelInit
    ) -> None:
        """The same for a copy of a plain model, with an adapter of so many parameters or in full; and save it."""
        known, new = len(self.base.labels), len(self.novel.labels)
        adapted: Any = with_classes(model, range(known), new, label_init).requires_grad_(True)
        if way in get_args(Adapter):
            adapted = add_adapter(adapted, way, num_parameters, self.options.seed)  # type: ignore[arg-type]
            train_label_rows_(adapted.get_base_model(), known, new)
        row = self.adapt(way, adapted, learning_rate)
        if isinstance(adapted, PeftModel):
            adapted = adapted.merge_and_unload()
        join_label_rows_(adapted)
        row |= self._cost(adapted) | {"base_before": self._loss(self.base, model)}
        row["base_after"] = self._loss(self.base, adapted)
        self.save(adapted, way)

    # KIND

    def draw_tailors(self, model: nn.Module) -> None:
        """Samples of the base classes with their own tailors, with none, and with another class's: tailors.png."""
        labels = self.base.sample_labels(EACH * len(self.base.labels))
        gates = {
            "own tailors": labels,
            "learngenes only": torch.full_like(labels, self.base.num_classes),
            "tailors of the next row": labels.roll(-1),
        }
        parts = [self._with_tailors(model, ids) for ids in gates.values()]
        if self.accelerator.is_main_process:
            apart = torch.ones_like(parts[0][:1])
            rows: dict[str, Tensor] = {}
            for place, name in enumerate(self.base.class_names):
                own = [part[place :: len(self.base.labels)] for part in parts]
                rows[name] = torch.cat([own[0], apart, own[1], apart, own[2]])
            titles = [title if i == EACH // 2 else "" for title in gates for i in range(EACH + 1)][:-1]
            image_grid(rows, self.output_dir / "tailors.png", column_labels=titles)

    def _with_tailors(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Samples of all classes in turn, with the tailors of the classes `ids`."""
        null = torch.full_like(ids, self.base.num_classes)
        with class_gate(model, torch.cat([ids, null]) if self.base.guidance_scale > 1 else ids):
            return self.base.samples(model, len(ids))

    def deploy(self, learngene: Learngene) -> None:
        """Take a learngene of all classes apart: what parts of it cost and know. One class is saved as a plain DiT."""
        known, new, name = self.base.labels, self.novel.labels, self.base.class_names[0]
        everything, novel = learngene.descend(), learngene.descend(classes=new)
        self.note("KIND, all classes", everything, "base_val_loss", "novel_val_loss", "class_val_loss")
        self.note("KIND, base classes", learngene.descend(classes=known), "base_val_loss", "class_val_loss")
        self.note("KIND, novel classes", novel, "novel_val_loss")
        self.note(f"KIND, class {name}", one := learngene.descend(classes=known[:1]), "class_val_loss")
        self.note(f"KIND, class {name}, merged", plain := one.merge_and_unload(), "class_val_loss")
        self.save(plain, f"class {name}")
        self.note("KIND, no class", learngene.descend(classes=[]))
        row = next(row for row in self.rows if row["way"] == "kind")
        before = next(row for row in self.models if row["model"] == "KIND")
        row |= self._cost(novel) | {"base_before": before["base_val_loss"]}
        row["base_after"] = self._loss(self.base, everything)

    # Numbers

    def note(self, name: str, model: nn.Module, *losses: str) -> None:
        """Add a model to the table of models: what it costs, and its losses, of columns that it knows the classes of.

        "class_val_loss" is that of the first class.
        """
        measures = {
            "base_val_loss": lambda: self._loss(self.base, model),
            "novel_val_loss": lambda: self._loss(self.novel, model),
            "class_val_loss": lambda: self._loss(self.base, model, self.base.labels[:1]),
        }
        self.models.append({"model": name, **self._cost(model), **{key: measures[key]() for key in losses}})

    def _cost(self, model: nn.Module) -> dict[str, Any]:
        return {"parameters": count_parameters(model), "MFLOPs": count_flops(model, self.base) / 1e6}

    def _loss(self, task: DiffusionTask, model: nn.Module, labels: Sequence[int] | None = None) -> float:
        return task.bank.loss(model.to(self.accelerator.device).eval(), labels=labels)

    def report(self) -> dict[str, Any]:
        """Print the tables, write results.json, curves.png and samples.png, and return the results."""
        results = self.write({"models": self.models, **self.more})
        if self.accelerator.is_main_process:
            print(f"\n{' + '.join(self.base.class_names)} -> {' + '.join(self.novel.class_names)}")
            print("by training step: loss on the novel classes; base: loss on the base classes, before and after;")
            print(
                f"parameters and FLOPs (one image) of what is deployed; Frechet distance of {self.num_samples} samples"
            )
            print("(lower is better)\n")
            print(self.table())
            print(f"\nKIND taken apart (class_val_loss: of {self.base.class_names[0]})\n")
            print(format_table(self.models, self.model_columns))
        return results


def combine(runs: Sequence[Adaptation], seeds: Sequence[int], output_dir: str) -> Adaptation:
    """The comparison over several seeds: means, and half the range beside them. Pictures are those of the first."""
    if len(runs) == 1:
        return runs[0]
    whole = copy.copy(runs[0])
    whole.output_dir = Path(output_dir)
    whole.rows, whole.models = mean_rows([run.rows for run in runs]), mean_rows([run.models for run in runs])
    whole.panels = mean_curves([run.panels for run in runs])
    whole.more = {"seeds": list(seeds), "runs": [{"rows": run.rows, "models": run.models} for run in runs]}
    return whole
