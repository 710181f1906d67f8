# SPDX-License-Identifier: Apache-2.0
"""The one training loop of all scripts: the script brings a model and a loss, the loop brings everything else.

What a step computes is a pure function of the weights and of (seed, step): the samples come from `StepBatchSampler`,
the loss gets a generator of its own for noise, timesteps and dropped labels, and torch's global generator is seeded
for dropout in the model. So k steps + resume + (N - k) steps are N steps, bit for bit on a CPU; and since the random
numbers belong to shards of the batch (`sampler.py`), P processes x A micro-steps give the same training for every way
to write P * A as a product, up to the order of summation.

That holds for one training only. So every checkpoint carries its signature: all that decides what the steps compute
(rates, schedule, precision, batches, digests of the starting weights and of the data, and what the caller adds of its
loss), and a training with another one does not go on from it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .checkpoints import resolve_checkpoint
from .options import TrainingOptions
from .sampler import StepBatchSampler
from .tracking import check_processes
from .trainer import LossFunction, Trainer


__all__ = ["LossFunction", "TrainingOptions", "train"]


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
    signature: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place with AdamW, and return the history.

    Can be called many times with one accelerator, for one model after the other; whatever else was prepared with it is
    released. Models that the loss only looks at, such as a teacher, need not be prepared.

    Args:
        accelerator: Of `create_accelerator`, or your own; says how many micro-steps to accumulate, and the precision.
        model: Any module; what does not require a gradient is left alone. It ends in `eval()`, on the accelerator's
            device. To resume, give it with the weights that the training started from.
        loss_fn: See `LossFunction`.
        dataset: Of dicts, which are collated into batches; of known length.
        options: How to train. A training whose schedule is constant can be resumed with more steps than it had.
        output_dir: Of this training's checkpoints: its own folder, where a script trains several models.
        name: Of the progress bar, and the prefix of what is logged (`<name>/loss`, `<name>/lr`, `<name>/<evaluated>`).
        param_groups: For AdamW (betas, weight_decay, ... as you like; weight decay is 0 unless given); default: all
            trainable parameters in one.
        evaluate: Called with the steps done, on every process, while the model is in `eval()` and holds its moving
            average, if there is one.
        eval_steps: When to call it; 0 is before the first step, `max_train_steps` after the last.
        signature: JSON data that decides what the loss and `evaluate` compute and that cannot be seen from here: their
            settings, digests of a teacher and of validation data (`checkpoints.digest`).

    Returns:
        One dict per step done: "step" (from 1), "loss" (mean over all processes, before the update), "lr", and what
        `evaluate` returned after it; if step 0 was evaluated, a first dict without loss and lr. A resumed training
        returns all of it, from the first step on.

    Raises:
        ValueError: Nothing to train, parameters in no group, a loss that is not finite, or a checkpoint of another
            training or of more steps than are wanted; see also `resolve_checkpoint`, `load_checkpoint`,
            `check_processes`.
    """
    check_processes(accelerator)
    checkpoint = resolve_checkpoint(output_dir, options.resume_from_checkpoint)
    accelerator.free_memory()  # of an earlier training with this accelerator
    trainer = Trainer(accelerator, model, loss_fn, options, name, param_groups, evaluate, eval_steps)
    every, sealed = options.checkpointing_steps, {}
    if every or checkpoint is not None:
        sealed = trainer.signature(dataset) | dict(signature or {})
    first = 0 if checkpoint is None else trainer.resume(checkpoint, sealed)
    batches = iter(_loader(accelerator, dataset, options, first))

    model.train()
    if first == 0:
        trainer.begin()
    progress = tqdm(
        desc=name,
        total=options.max_train_steps,
        initial=first,
        disable=not accelerator.is_main_process,
        mininterval=1.0,
    )
    for step in range(first, options.max_train_steps):
        loss = trainer.do(step, batches)
        progress.update()
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if every and (step + 1 == options.max_train_steps or (step + 1) % every == 0):
            trainer.save(output_dir, step + 1, sealed)
    progress.close()
    trainer.end()
    return trainer.history


def _loader(accelerator: Accelerator, dataset: Dataset[Any], options: TrainingOptions, first: int) -> DataLoader[Any]:
    """This process's batches of all steps from `first` on, one after the other."""
    micro_steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    sampler = StepBatchSampler(
        len(dataset),  # type: ignore[arg-type]
        options.train_batch_size * micro_steps * processes,
        seed=options.seed,
        start_step=first,
        num_steps=options.max_train_steps,
        process_index=accelerator.process_index,
        num_processes=processes,
        accumulation=micro_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own, because starting to iterate draws from the global one
    )
