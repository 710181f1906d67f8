# SPDX-License-Identifier: Apache-2.0
"""The classification task: a ViT on images by class."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..data.image_classes import ImageClasses
from ..data.labels import label_names, match_labels, named_by
from ..runs.checkpoints import describe_samples
from .tasks import Call, check_patch_size


__all__ = ["ClassificationTask"]


class ClassificationTask:
    """Cross-entropy; a student learns  alpha tau^2 KL(teacher || student) + (1 - alpha) CE.

    WAVE writes KL + CE without weights or temperature: alpha = 1/2, tau = 1 (note on WAVE, 1.2). The KL is averaged
    over the batch, not over batch and classes, or it would vanish beside the cross-entropy.

    Args:
        data: images by class.
        alpha: weight of the KL.
        tau: temperature of the KL.
    """

    def __init__(self, data: ImageClasses, *, alpha: float = 0.5, tau: float = 1.0) -> None:
        if not 0 <= alpha <= 1 or not tau > 0:
            raise ValueError(f"alpha={alpha} must lie in [0, 1] and tau={tau} must be positive.")
        self.data, self.alpha, self.tau = data, alpha, tau
        self.train_data: Dataset[Any] = data.train
        self.class_names = data.class_names

    def new_model(
        self, *, seed: int, num_layers: int, num_attention_heads: int, attention_head_dim: int, patch_size: int
    ) -> ViTForImageClassification:
        """A ViT for these images and classes."""
        check_patch_size(patch_size, self.data.resolution)
        width = num_attention_heads * attention_head_dim
        config = ViTConfig(
            num_hidden_layers=num_layers,
            num_attention_heads=num_attention_heads,
            hidden_size=width,
            intermediate_size=4 * width,
            patch_size=patch_size,
            image_size=self.data.resolution,
            num_channels=self.data.channels,
            id2label=dict(enumerate(self.class_names)),
            label2id={name: label for label, name in enumerate(self.class_names)},
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ViTForImageClassification(config)

    @property
    def companions(self) -> dict[str, Any]:
        return {"preprocessor": self.data.image_processor}

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise a ValueError if a loaded model cannot take these images, or its labels are not these classes."""
        config = model.config
        size = getattr(config, "image_size", None) or self.data.resolution  # a convolutional net takes any
        sides = set(size) if isinstance(size, list | tuple) else {size}
        found = (getattr(config, "num_channels", self.data.channels), *sides)
        if found != (self.data.channels, self.data.resolution):
            raise ValueError(
                f"the model takes {found[0]} channels of {size} pixels; the data have {self.data.channels} channels "
                f"of {self.data.resolution} pixels."
            )
        labels = label_names(config.id2label, config.num_labels)
        if len(labels) != len(self.class_names):
            raise ValueError(f"the model has {len(labels)} labels; the data have {len(self.class_names)} classes.")
        labels = named_by(labels, dict(enumerate(self.class_names)))  # what has no name is whatever class is there
        if labels != self.class_names and (ids := match_labels(self.class_names, labels)) != list(range(len(labels))):
            raise ValueError(
                f"the classes {self.class_names[:5]} of the data are the labels {ids[:5]} of the model: "
                "`data.class_split.relabel_classes` puts these on the images."
            )

    @property
    def settings(self) -> dict[str, Any]:
        return {"validation": self._validation}

    @property
    def distillation_settings(self) -> dict[str, Any]:
        return {**self.settings, "alpha": self.alpha, "tau": self.tau}

    @cached_property
    def _validation(self) -> dict[str, Any]:
        return describe_samples(self.data.validation)

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
        loss = correct = total = 0.0
        for batch in DataLoader(self.data.validation, batch_size=256):
            logits = model(pixel_values=batch["images"].to(device)).logits.float()
            labels = batch["labels"].to(device)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(-1) == labels).sum().item()
            total += len(labels)
        return {"val_loss": loss / total, "accuracy": correct / total}

    def samples(self, model: nn.Module, count: int) -> None:
        """A classifier makes no images."""

    def real_samples(self, count: int) -> None:
        """Nothing to show them beside."""

    def frechet_distance(self, images: Tensor) -> float:
        raise ValueError("a classifier makes no images to measure.")
