# SPDX-License-Identifier: Apache-2.0
"""The classification task: a ViT on images by class."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from ..data.image_classes import ImageClasses
from ..runs.checkpoints import describe_samples
from .tasks import Call, check_patch_size, first_line


__all__ = ["ClassificationTask", "load_classifier"]


def load_classifier(
    pretrained_model_name_or_path: str, *, revision: str | None = None, variant: str | None = None
) -> PreTrainedModel:
    """An image classifier of transformers (ViT, DeiT, ...) in float32, folder or Hub id.

    Raises:
        ValueError: there is none, or it has no trained head.
    """
    name, options = pretrained_model_name_or_path, {"revision": revision or "main", "variant": variant}
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained_model_name_or_path={name!r} holds no image classifier: {first_line(error)}"
        ) from error
    if missing := loading["missing_keys"]:
        raise ValueError(
            f"pretrained_model_name_or_path={name!r} is no trained classifier: it lacks {sorted(missing)[:3]}."
        )
    return model


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
            num_labels=len(self.data.class_names),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ViTForImageClassification(config)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise a ValueError if a loaded model cannot take these images or classes."""
        config = model.config
        found = (getattr(config, "num_channels", 3), getattr(config, "image_size", None), config.num_labels)
        given = (self.data.channels, self.data.resolution, len(self.data.class_names))
        if found != given:
            raise ValueError(
                "the model takes {} channels of {} pixels and knows {} classes; ".format(*found)
                + "the data have {} channels of {} pixels and {} classes.".format(*given)
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
