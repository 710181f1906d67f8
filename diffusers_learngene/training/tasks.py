# SPDX-License-Identifier: Apache-2.0
"""What a script trains for: class-conditional diffusion with a DiT, or image classification with a ViT.

A task knows its models, its loss, its distillation and its measures; the scripts know the method. A model is called
through the task only, so that an elastic student of a given size stands in for a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..dit import drop_labels
from .diffusion import ValidationBank, denoising_loss, draw_noise, predict_noise


Call = Callable[..., Any]


class Task(Protocol):
    """What the scripts need of a task."""

    def loss(self, model: Call, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Training loss on a batch, a scalar."""

    def distillation_loss(
        self, student: Call, teacher: Call, batch: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Loss of a student that is to do what the teacher does, a scalar."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers on the validation images; "val_loss" is the one that models are compared by."""


@dataclass
class DiffusionTask:
    """Denoising with classifier-free guidance; the student learns the teacher's prediction (and the noise itself).

    Args:
        scheduler: of the noise.
        bank: fixed validation noise.
        num_classes: also the index of the null class.
        label_dropout: how often the label is replaced by the null class.
        noise_weight: weight of the denoising loss beside the distillation; the teacher's prediction is the less noisy
            target, the denoising loss lets a student be better than its teacher.
    """

    scheduler: DDPMScheduler
    bank: ValidationBank
    num_classes: int
    label_dropout: float = 0.1
    noise_weight: float = 0.0

    def loss(self, model: Call, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return denoising_loss(
            model,
            batch["images"],
            batch["labels"],
            self.scheduler,
            generator,
            num_classes=self.num_classes,
            label_dropout=self.label_dropout,
        )

    def distillation_loss(
        self, student: Call, teacher: Call, batch: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        images = batch["images"]
        noise, timesteps = draw_noise(images, self.scheduler, generator)
        labels = drop_labels(batch["labels"], self.label_dropout, self.num_classes, generator)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        with torch.no_grad():
            target = predict_noise(teacher, noisy, timesteps, labels)
        prediction = predict_noise(student, noisy, timesteps, labels).float()
        return F.mse_loss(prediction, target.float()) + self.noise_weight * F.mse_loss(prediction, noise.float())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": self.bank.loss(model)}


@dataclass
class ClassificationTask:
    """Cross-entropy; the student learns  alpha tau^2 KL(teacher || student) + (1 - alpha) CE.

    WAVE writes KL + CE without weights or temperature: alpha = 1/2, tau = 1 (note on WAVE, 1.2). The KL is averaged over
    the batch, not over batch and classes, or it would vanish beside the cross-entropy.
    """

    validation: Any
    alpha: float = 0.5
    tau: float = 1.0

    def loss(self, model: Call, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(pixel_values=batch["images"]).logits.float(), batch["labels"])

    def distillation_loss(
        self, student: Call, teacher: Call, batch: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        logits = student(pixel_values=batch["images"]).logits.float()
        with torch.no_grad():
            target = teacher(pixel_values=batch["images"]).logits.float()
        student_log, teacher_log = F.log_softmax(logits / self.tau, -1), F.log_softmax(target / self.tau, -1)
        divergence = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * self.tau**2
        return self.alpha * divergence + (1 - self.alpha) * F.cross_entropy(logits, batch["labels"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = correct = loss = 0.0
        for batch in torch.utils.data.DataLoader(self.validation, batch_size=256):
            images, labels = batch["images"].to(device), batch["labels"].to(device)
            logits = model(pixel_values=images).logits.float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(-1) == labels).sum().item()
            total += len(labels)
        return {"val_loss": loss / total, "accuracy": correct / total}
