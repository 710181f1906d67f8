# SPDX-License-Identifier: Apache-2.0
"""The one training loop of all scripts: the script brings a model and a loss, the loop brings everything else.

What a step computes is a pure function of the weights and of (seed, step): the samples come from `StepBatchSampler`,
the loss gets a generator of its own for noise, timesteps and dropped labels, and torch's global generator is seeded
for dropout in the model. So k steps + resume + (N - k) steps are N steps, bit for bit on a CPU; and since the random
numbers belong to shards of the batch (`sampler.py`), P processes x A micro-steps give the same training for every way
to write P * A as a product, up to the order of summation.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .checkpoints import load_checkpoint, resolve_checkpoint, save_checkpoint
from .sampler import StepBatchSampler, derived_seed, seeded_generator
from .tracking import check_processes


__all__ = ["LossFunction", "TrainingOptions", "train"]

# (model, batch, generator, step) -> the mean loss over the batch, a scalar. `model` is the one that accelerate
# prepared, `batch` is on its device, the CPU `generator` is seeded by (seed, step, shard), `step` counts optimiser
# steps from 0.
LossFunction = Callable[[nn.Module, dict[str, torch.Tensor], torch.Generator, int], torch.Tensor]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, in the words of diffusers' example scripts.

    Args:
        max_train_steps: Optimiser steps.
        train_batch_size: Samples per process and micro-step.
        learning_rate: Of the parameter groups that name none.
        lr_scheduler: A name of `diffusers.optimization.get_scheduler`.
        lr_warmup_steps: Optimiser steps over which the learning rate rises from 0.
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Of the order of the samples and of every generator handed to the loss.
        ema_decay: Keep a moving average of the trained parameters; evaluations use it, and it is what the model holds
            at the end.
        checkpointing_steps: Optimiser steps between checkpoints; the last step gets one, too. `None`: none at all.
        checkpoints_total_limit: Checkpoints to keep; `None`: all.
        resume_from_checkpoint: "latest" or a checkpoint's path.
        dataloader_num_workers: Processes that load data; 0 loads in this one.
    """

    max_train_steps: int
    train_batch_size: int = 64
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 0
    ema_decay: float | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    dataloader_num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "checkpointing_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("lr_warmup_steps", "seed", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} and max_grad_norm={self.max_grad_norm} must be positive."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1), or be None for no moving average.")


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFunction,
    dataset: Dataset[Any],
    options: TrainingOptions,
    *,
    output_dir: str,
    name: str,
    param_groups: Sequence[dict[str, Any]] | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    eval_steps: Collection[int] = (),
) -> list[dict[str, float]]:
    """Train `model` in place with AdamW, and return the history.

    Can be called many times with one accelerator, for one model after the other; whatever else was prepared with it is
    released. Models that the loss only looks at, such as a teacher, need not be prepared.

    Args:
        accelerator: Of `create_accelerator`, or your own; says how many micro-steps to accumulate, and the precision.
        model: Any module; what does not require a gradient is left alone. It ends in `eval()`, on the accelerator's
            device.
        loss_fn: See `LossFunction`.
        dataset: Of dicts, which are collated into batches; of known length.
        options: How to train.
        output_dir: Of this training's checkpoints: its own folder, where a script trains several models.
        name: Of the progress bar, and the prefix of what is logged (`<name>/loss`, `<name>/lr`, `<name>/<evaluated>`).
        param_groups: For AdamW (betas, weight_decay, ... as you like; weight decay is 0 unless given); default: all
            trainable parameters in one.
        evaluate: Called with the steps done, on every process, while the model is in `eval()` and holds its moving
            average, if there is one.
        eval_steps: When to call it; 0 is before the first step, `max_train_steps` after the last.

    Returns:
        One dict per step done: "step" (from 1), "loss" (mean over all processes, before the update), "lr", and what
        `evaluate` returned after it; if step 0 was evaluated, a first dict without loss and lr. A resumed training
        returns all of it, from the first step on.

    Raises:
        ValueError: Nothing to train, parameters in no group, or a loss that is not finite; see also
            `resolve_checkpoint`, `load_checkpoint`, `check_processes`.
    """
    check_processes(accelerator)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("model has no parameter that requires a gradient, so there is nothing to train.")
    checkpoint = resolve_checkpoint(output_dir, options.resume_from_checkpoint)

    micro_steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    total_batch_size = options.train_batch_size * micro_steps * processes
    groups = list(param_groups) if param_groups is not None else [{"params": list(trained.values())}]

    accelerator.free_memory()  # of an earlier training with this accelerator
    model.to(accelerator.device)
    fused = accelerator.device.type in ("cpu", "cuda", "mps", "xpu")  # half the time, even on a CPU
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0, fused=fused)
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if forgotten := [key for key, parameter in trained.items() if id(parameter) not in grouped]:
        raise ValueError(
            f"param_groups leaves out {forgotten[:5]}: add them, or freeze them with requires_grad_(False)."
        )
    # Kept out of `prepare`, which would make the schedule run `num_processes` times faster.
    lr_scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema = None if options.ema_decay is None else EMAModel(trained.values(), decay=options.ema_decay)

    first, history = 0, []
    signature = {
        "seed": options.seed,
        "samples": len(dataset),  # type: ignore[arg-type]
        "total_batch_size": total_batch_size,
        "shards": micro_steps * processes,
        "ema_decay": options.ema_decay,
    }
    if checkpoint is not None:
        state = load_checkpoint(accelerator, checkpoint, signature, list(trained), ema=ema)
        first, history = state["step"], state["history"]
        lr_scheduler.load_state_dict(state["lr_scheduler"])

    def evaluate_after(step: int) -> dict[str, float]:
        if evaluate is None or step not in eval_steps:
            return {}
        model.eval()
        with _averaged(ema, trained):
            values = {key: float(value) for key, value in evaluate(step).items()}
        model.train()
        accelerator.log({f"{name}/{key}": value for key, value in values.items()}, step=step)
        return values

    sampler = StepBatchSampler(
        len(dataset),  # type: ignore[arg-type]
        total_batch_size,
        seed=options.seed,
        start_step=first,
        num_steps=options.max_train_steps,
        process_index=accelerator.process_index,
        num_processes=processes,
        accumulation=micro_steps,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own, because starting to iterate draws from the global one
    )
    batches = iter(loader)

    model.train()
    if first == 0 and (values := evaluate_after(0)):
        history.append({"step": 0, **values})
    progress = tqdm(
        desc=name,
        total=options.max_train_steps,
        initial=first,
        disable=not accelerator.is_main_process,
        mininterval=1.0,
    )
    for step in range(first, options.max_train_steps):
        loss = torch.zeros((), device=accelerator.device)
        for micro_step in range(micro_steps):
            batch = send_to_device(next(batches), accelerator.device)
            shard = micro_step * processes + accelerator.process_index
            torch.manual_seed(derived_seed(options.seed, step, shard, 1))  # of dropout in the model
            with accelerator.accumulate(prepared):  # the processes' gradients meet in the last micro-step
                shard_loss = loss_fn(prepared, batch, seeded_generator(options.seed, step, shard), step)
                accelerator.backward(shard_loss)
            loss += shard_loss.detach() / micro_steps
        record = {
            "step": step + 1,
            "loss": accelerator.reduce(loss, "mean").item(),
            "lr": lr_scheduler.get_last_lr()[0],
        }
        if not math.isfinite(record["loss"]):
            raise ValueError(
                f"The loss of {name!r} is {record['loss']} at step {step + 1}: lower the learning rate "
                f"({options.learning_rate}), lengthen lr_warmup_steps ({options.lr_warmup_steps}), or take "
                "mixed_precision='no' to see whether the precision is to blame."
            )
        accelerator.clip_grad_norm_(list(trained.values()), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if ema is not None:
            ema.step(trained.values())
        accelerator.log({f"{name}/loss": record["loss"], f"{name}/lr": record["lr"]}, step=step + 1)
        history.append({**record, **evaluate_after(step + 1)})
        progress.update()
        progress.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        every, last = options.checkpointing_steps, step + 1 == options.max_train_steps
        if every and (last or (step + 1) % every == 0):
            state = {
                "step": step + 1,
                "signature": signature,
                "lr_scheduler": lr_scheduler.state_dict(),
                "history": history,
            }
            save_checkpoint(
                accelerator,
                output_dir,
                state,
                list(trained),
                ema=ema,
                total_limit=options.checkpoints_total_limit,
            )
    progress.close()

    if ema is not None:
        ema.copy_to(trained.values())
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    model.eval()
    return history


@contextmanager
def _averaged(ema: EMAModel | None, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters hold their moving average."""
    if ema is None:
        yield
        return
    ema.store(trained.values())
    ema.copy_to(trained.values())
    try:
        yield
    finally:
        ema.restore(trained.values())
