# SPDX-License-Identifier: Apache-2.0
"""Descendants of a learngene beside what else one could have started from, on the same data for the same steps.

    learngene   descend, train the scalers, merge, train all: evaluated from step 0, before any training
    scratch     the class's own initialisation
    selection   layers and elements of the ancestry (`initializers.selection`), the best of three residual gains

All see the same batches with the same noise, and each is trained at the rate that suits it. The results are a table,
a JSON file with everything needed to repeat them, curves, and a grid of samples.
"""

from typing import Any, get_args

from accelerate import Accelerator
from torch import nn

from ..anatomy.models import model_config
from ..anatomy.sizes import depth_key
from ..functional.resize import DepthInit
from ..initializers import scratch, selection
from ..learngene import Learngene
from ..runs.loop import TrainingOptions
from .tasks import Task
from .trials import History, Trials, evaluation_steps


__all__ = ["Comparison"]


class Comparison(Trials):
    """Runs the comparison one size at a time, then reports.

    Args:
        options, output_dir, num_samples, gradient_checkpointing: as `Trials` has them.
        scaler_steps: of `options.max_train_steps`, those on the scalers alone.
        scaler_learning_rate, finetune_learning_rate, scratch_learning_rate: of the scalers, of what starts from
            trained weights, and of what starts from random ones.
        trained_ancestry: whether the ancestry knows anything that one could select.
    """

    first_columns = ("size", "start", "parameters")
    last_columns = ("frechet@0", "frechet")

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
        super().__init__(
            accelerator,
            task,
            options,
            output_dir=output_dir,
            eval_steps=evaluation_steps(options.max_train_steps, scaler_steps),
            num_samples=num_samples,
            gradient_checkpointing=gradient_checkpointing,
            belongings=learngene.belongings,
        )
        self.ancestry, self.learngene, self.trained_ancestry = ancestry, learngene, trained_ancestry
        self.scaler_steps, self.scaler_learning_rate = scaler_steps, scaler_learning_rate
        self.finetune_learning_rate, self.scratch_learning_rate = finetune_learning_rate, scratch_learning_rate
        ancestry.to(accelerator.device).eval()
        if trained_ancestry:
            row = self._record("ancestry", "ancestry", ancestry, {0: task.evaluate(ancestry)})
            row["frechet"] = self.sample("ancestry", ancestry)

    def run(self, overrides: dict) -> None:
        """Compare at one size, given as config overrides."""
        name = _name(overrides)
        title = name if self.learngene.seen(overrides) else f"{name} (never seen)"

        descendant = self.learngene.descend(**overrides)
        untrained = self.sample(f"{name}: learngene, untrained", descendant)
        history = self.train(descendant, f"{name} scalers", self.scaler_steps, self.scaler_learning_rate)
        model = descendant.merge_and_unload().requires_grad_(True)
        rest = self.options.max_train_steps - self.scaler_steps
        if rest:
            history |= self.train(model, f"{name} learngene", rest, self.finetune_learning_rate, self.scaler_steps)
        row = self._record("learngene", title, model, history)
        self.save(model, name)
        row |= {"frechet@0": untrained, "frechet": self.sample(f"{name}: learngene", model)}

        others = [("scratch", scratch(self.ancestry, overrides, seed=self.options.seed), self.scratch_learning_rate)]
        if self.trained_ancestry:
            others.append(("selection", self._best_selection(overrides), self.finetune_learning_rate))
        for start, model, rate in others:
            history = self.train(model, f"{name} {start}", self.options.max_train_steps, rate)
            row = self._record(start, title, model, history)
            row["frechet"] = self.sample(f"{name}: {start}", model)

    def ablate_sigma_init(self, overrides: dict, learning_rate: float) -> None:
        """Compare every start that the scalers of a size can have, before and while only they are trained.

        For a quarter of the steps that other rows have, because there are five of these.
        """
        name, steps = _name(overrides), self.options.max_train_steps // 4
        for how in get_args(DepthInit):
            descendant = self.learngene.descend(sigma_init=how, **overrides)
            history = self.train(descendant, f"{name} sigma {how}", steps, learning_rate)
            self._record(how, f"{name}, sigma only", descendant, history)

    def report(self) -> dict[str, Any]:
        """Print the table, write results.json, curves.png and samples.png, and return the results."""
        own, all_of_it = self.learngene.num_parameters, self.learngene.ancestry_parameters
        results = self.write({"learngene": {"parameters": own, "ancestry": all_of_it}})
        if self.accelerator.is_main_process:
            print(f"\nlearngene: {own:,} parameters, {own / all_of_it:.0%} of the ancestry's {all_of_it:,}")
            frechet = f"; Frechet distance of {self.num_samples} samples (lower is better)" if self.grid else ""
            print(f"validation by training step{frechet}\n")
            print(self.table())
        return results

    def _best_selection(self, overrides: dict) -> nn.Module:
        """The strongest start by selection: no gain, the ratio of depths, or its root, by validation loss."""
        config = model_config(self.ancestry)
        depth = config[depth_key(config)]
        ratio = depth / overrides.get(depth_key(config), depth)
        candidates = [selection(self.ancestry, overrides, gain=gain) for gain in sorted({1.0, ratio, ratio**0.5})]
        for candidate in candidates:
            candidate.to(self.accelerator.device).eval()
        return min(candidates, key=lambda candidate: self.task.evaluate(candidate)["val_loss"])

    def _record(self, start: str, size: str, model: nn.Module, history: History) -> dict[str, Any]:
        row = {"size": size, "start": start, "parameters": sum(p.numel() for p in model.parameters())}
        return self.record(row, history, None if start == "ancestry" else size, start)


def _name(overrides: dict) -> str:
    return " ".join(f"{key.removeprefix('num_')}={value}" for key, value in overrides.items())
