# SPDX-License-Identifier: Apache-2.0
"""What a script trains for, behind one interface: `DiffusionTask` (a DiT by class), `ClassificationTask` (a ViT).

A task knows its data, its models, its loss, its distillation and its measures; the scripts know the method. It only
ever calls models, so an elastic student of one size stands in for a model.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..anatomy.models import model_config


__all__ = ["Call", "Task", "check_patch_size", "first_line", "signature_of"]

Call = Callable[..., Any]


def first_line(error: Exception) -> str:
    """What an error says, without the paragraphs that the libraries add."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_patch_size(patch_size: int, size: int) -> None:
    """Raise a ValueError if patches do not cover an image or latent of that size: the rest would be cut off."""
    if size % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide the {size} pixels of an image or latent.")


class Task(Protocol):
    """What the scripts need of a task."""

    train_data: Dataset[Any]
    class_names: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """JSON data that decides what `loss` and `evaluate` compute, for the signature of a training."""

    @property
    def distillation_settings(self) -> dict[str, Any]:
        """The same of `distillation_loss`, beside the teacher."""

    @property
    def companions(self) -> dict[str, Any]:
        """What of `anatomy.companions.Companions` a model of this task gets from its images."""

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError if a model cannot take the task's images or classes."""

    def loss(self, model: Call, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Training loss on a batch, a scalar."""

    def distillation_loss(
        self, student: Call, teacher: Call, batch: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Loss of a student that is to do what the teacher does, a scalar."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers on the validation images; "val_loss" is the one that models are compared by."""

    def samples(self, model: nn.Module, count: int) -> Tensor | None:
        """Images (count, C, H, W) in [-1, 1] that a model makes, classes in turn; None where it makes none."""

    def real_samples(self, count: int) -> Tensor | None:
        """Validation images (count, C, H, W) in [-1, 1], classes in turn; None where none are made to compare with."""

    def frechet_distance(self, images: Tensor) -> float:
        """Distance of a set of images from the validation images."""


def signature_of(task: Task, model: nn.Module) -> dict[str, Any]:
    """What a model is trained for and what it is, for `loop.train`: its weights alone do not say how they are used."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"task": task.settings, "model": model_config(base)}
