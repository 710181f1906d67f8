# SPDX-License-Identifier: Apache-2.0
"""How to train, in the words of diffusers' example scripts."""

import math
from dataclasses import dataclass


__all__ = ["TrainingOptions"]


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
        if not 0 < self.learning_rate < math.inf or not self.max_grad_norm > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} and max_grad_norm={self.max_grad_norm} must be positive."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1), or be None for no moving average.")
