# SPDX-License-Identifier: Apache-2.0
"""What `loop.train` does with a model: its steps, its signature, and how both are saved and gone on from."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from .checkpoints import describe_samples, digest, load_checkpoint, save_checkpoint
from .options import TrainingOptions
from .sampler import derived_seed, seeded_generator


__all__ = ["LossFunction", "Trainer"]

# (model, batch, generator, step) -> the mean loss over the batch, a scalar. `model` is the one that accelerate
# prepared, `batch` is on its device, the CPU `generator` is seeded by (seed, step, shard), `step` counts optimiser
# steps from 0.
LossFunction = Callable[[nn.Module, dict[str, Tensor], torch.Generator, int], Tensor]

_ALWAYS = ("step", "loss", "lr")  # in the history, whether evaluated or not


class Trainer:
    """A model with its optimiser, schedule, moving average and history; the arguments are those of `train`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss_fn: LossFunction,
        options: TrainingOptions,
        name: str,
        param_groups: Sequence[dict[str, Any]] | None,
        evaluate: Callable[[int], dict[str, float]] | None,
        eval_steps: Collection[int],
    ) -> None:
        self.accelerator, self.model, self.loss_fn = accelerator, model, loss_fn
        self.options, self.name = options, name
        self.evaluate, self.eval_steps = evaluate, set() if evaluate is None else set(eval_steps)
        self.history: list[dict[str, float]] = []
        self.trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        if not self.trained:
            raise ValueError("model has no parameter that requires a gradient, so there is nothing to train.")
        groups = list(param_groups) if param_groups is not None else [{"params": list(self.trained.values())}]
        model.to(accelerator.device)
        fused = accelerator.device.type in ("cpu", "cuda", "mps", "xpu")  # half the time, even on a CPU
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0, fused=fused)
        grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if forgotten := [key for key, parameter in self.trained.items() if id(parameter) not in grouped]:
            raise ValueError(
                f"param_groups leaves out {forgotten[:5]}: add them, or freeze them with requires_grad_(False)."
            )
        # Kept out of `prepare`, which would make the schedule run `num_processes` times faster.
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = None if options.ema_decay is None else EMAModel(self.trained.values(), decay=options.ema_decay)

    def signature(self, dataset: Dataset[Any]) -> dict[str, Any]:
        """Of the training that is about to start: all that can be seen from here. The main process's, on all of them.

        Of the steps wanted only where the schedule depends on them.
        """
        options, accelerator, groups = self.options, self.accelerator, self.optimizer.param_groups
        schedule = {"lr_scheduler": options.lr_scheduler, "lr_warmup_steps": options.lr_warmup_steps}
        if options.lr_scheduler == "constant":
            del schedule["lr_warmup_steps"]
        elif options.lr_scheduler != "constant_with_warmup":
            schedule["max_train_steps"] = options.max_train_steps
        found: list[Any] = [None]
        if accelerator.is_main_process:
            tensors = (*self.model.named_parameters(), *self.model.named_buffers())
            found = [
                {
                    "seed": options.seed,
                    "learning_rate": [group["initial_lr"] for group in groups],
                    "adamw": [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in groups],
                    "group_sizes": [len(group["params"]) for group in groups],
                    **schedule,
                    "max_grad_norm": options.max_grad_norm,
                    "ema_decay": options.ema_decay,
                    "mixed_precision": accelerator.mixed_precision,
                    "total_batch_size": options.train_batch_size * self._shards,
                    "shards": self._shards,
                    "data": describe_samples(dataset),
                    "starting_weights": digest((*tensors, ("trained", sorted(self.trained)))),
                }
            ]
        return broadcast_object_list(found)[0]

    @property
    def _shards(self) -> int:
        """Of a step's batch."""
        return self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes

    def resume(self, checkpoint: Path, signature: Mapping[str, Any]) -> int:
        """Go on from a checkpoint; returns the steps done.

        Raises:
            ValueError: it is of another training or damaged, of more steps than are wanted, or something that is to be
                evaluated lies behind.
        """
        state = load_checkpoint(self.accelerator, checkpoint, signature, list(self.trained), ema=self.ema)
        done = state["step"]
        if done > self.options.max_train_steps:
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r} lies beyond max_train_steps="
                f"{self.options.max_train_steps}: give at least {done}, or start anew in another output_dir."
            )
        if missed := sorted({step for step in self.eval_steps if step <= done} - set(state["evaluated"])):
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r} is of a training that was evaluated after the steps "
                f"{state['evaluated']} and not after {missed}, as eval_steps says now: give the same, or start anew "
                "in another output_dir."
            )
        for record in state["history"]:  # as if only what is wanted now had been evaluated
            kept = record if record["step"] in self.eval_steps else {k: record[k] for k in record if k in _ALWAYS}
            self.history += [kept] if kept.keys() > {"step"} else []
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        return done

    def begin(self) -> None:
        """Evaluate before the first step."""
        if values := self._evaluated(0):
            self.history.append({"step": 0, **values})

    def do(self, step: int, batches: Iterator[dict[str, Tensor]]) -> float:
        """One optimiser step, and what is to be evaluated after it; returns the loss before it."""
        accelerator, options = self.accelerator, self.options
        loss = self._accumulate(step, batches)
        record = {"step": step + 1, "loss": loss, "lr": self.lr_scheduler.get_last_lr()[0]}
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss of {self.name!r} is {loss} at step {step + 1}: lower the learning rate "
                f"({options.learning_rate}), lengthen lr_warmup_steps ({options.lr_warmup_steps}), or take "
                "mixed_precision='no' to see whether the precision is to blame."
            )
        accelerator.clip_grad_norm_(list(self.trained.values()), options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.trained.values())
        accelerator.log({f"{self.name}/loss": loss, f"{self.name}/lr": record["lr"]}, step=step + 1)
        self.history.append({**record, **self._evaluated(step + 1)})
        return loss

    def _accumulate(self, step: int, batches: Iterator[dict[str, Tensor]]) -> float:
        """Gradients of a step's whole batch, and its mean loss over all processes."""
        accelerator, options = self.accelerator, self.options
        loss, micro_steps = torch.zeros((), device=accelerator.device), accelerator.gradient_accumulation_steps
        for micro_step in range(micro_steps):
            batch = send_to_device(next(batches), accelerator.device)
            shard = micro_step * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(derived_seed(options.seed, step, shard, 1))  # of dropout in the model
            with accelerator.accumulate(self.prepared):  # the processes' gradients meet in the last micro-step
                generator = seeded_generator(options.seed, step, shard)
                shard_loss = self.loss_fn(self.prepared, batch, generator, step)
                accelerator.backward(shard_loss)
            loss += shard_loss.detach() / micro_steps
        return accelerator.reduce(loss, "mean").item()

    def _evaluated(self, step: int) -> dict[str, float]:
        if self.evaluate is None or step not in self.eval_steps:
            return {}
        self.model.eval()
        with self._averaged():
            values = {key: float(value) for key, value in self.evaluate(step).items()}
        self.model.train()
        self.accelerator.log({f"{self.name}/{key}": value for key, value in values.items()}, step=step)
        return values

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained.values())
        self.ema.copy_to(self.trained.values())
        try:
            yield
        finally:
            self.ema.restore(self.trained.values())

    def save(self, output_dir: str, done: int, signature: Mapping[str, Any]) -> None:
        """Write a checkpoint."""
        state = {
            "step": done,
            "signature": signature,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "history": self.history,
            "evaluated": sorted(step for step in self.eval_steps if step <= done),
        }
        limit = self.options.checkpoints_total_limit
        save_checkpoint(self.accelerator, output_dir, state, list(self.trained), ema=self.ema, total_limit=limit)

    def end(self) -> None:
        """Leave the model as it was found: not prepared, in `eval()`, with its moving average."""
        if self.ema is not None:
            self.ema.copy_to(self.trained.values())
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.model.eval()
