# SPDX-License-Identifier: Apache-2.0
"""The diffusion task: a class-conditional DiT on images by class, in pixels or in the latents of a VAE."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..anatomy.dit import create_dit, drop_labels
from ..data.image_classes import ImageClasses
from ..data.latents import cache_latents, decode_latents
from ..metrics import load
from ..metrics.features import classifier_features
from ..runs.checkpoints import digest
from ..runs.sampler import seeded_generator
from .diffusion import (
    ValidationBank,
    denoising_loss,
    draw_noise,
    noise_scheduler,
    predict,
    sample,
    target_of,
)
from .tasks import Call, check_patch_size


__all__ = ["DiffusionTask", "check_dit", "model_shape"]

MAX_REAL = 5000  # real images that the Frechet distance takes


class DiffusionTask:
    """Denoising with classifier-free guidance; a student learns its teacher's prediction (and, weighted, the target).

    Args:
        data: images by class.
        vae: the model works on its latents; None: on pixels.
        scheduler: of the noise that a loaded model was trained for; default: `noise_scheduler`'s.
        latents_dir: where latents are cached; None: in memory.
        label_dropout: how often a label is replaced by the null class.
        noise_weight: weight of the denoising loss beside the distillation. The teacher's prediction is the less noisy
            target of the two; the noise itself lets a student become better than a teacher that was trained briefly.
        num_inference_steps, guidance_scale: of the samples.
        seed: of the validation noise and of the samples.
        labels: of the classes that it is about, if the data know more; their names are `class_names`.
        feature_data: images by class that the features of the Frechet distance are fitted on; default: `data`.
    """

    def __init__(
        self,
        data: ImageClasses,
        *,
        vae: AutoencoderKL | None = None,
        scheduler: DDPMScheduler | None = None,
        latents_dir: str | None = None,
        label_dropout: float = 0.1,
        noise_weight: float = 1.0,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.5,
        seed: int = 0,
        device: torch.device | str = "cpu",
        labels: Sequence[int] | None = None,
        feature_data: ImageClasses | None = None,
    ) -> None:
        if not noise_weight >= 0:
            raise ValueError(f"noise_weight={noise_weight} must be at least 0.")
        self.data, self.vae, self.seed, self.device = data, vae, seed, device
        self.label_dropout, self.noise_weight = label_dropout, noise_weight
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.labels = list(range(len(data.class_names)) if labels is None else labels)
        self.class_names = [data.class_names[label] for label in self.labels]
        self.feature_data = feature_data or data
        self.num_classes = len(data.class_names)
        self.shape = model_shape(data, vae)
        self.scheduler = scheduler or noise_scheduler(latents=vae is not None)
        self.train_data: Dataset[Any] = data.train
        validation: Dataset[Any] = data.validation
        if vae is not None:
            vae.to(device).eval().requires_grad_(False)
            files = [
                Path(latents_dir, f"{name}.safetensors") if latents_dir else None for name in ("train", "validation")
            ]
            self.train_data = cache_latents(vae, data.train, path=files[0])
            validation = cache_latents(vae, data.validation, path=files[1])
        self.bank = ValidationBank(validation, self.scheduler, num_samples=720, seed=seed, device=device)

    def new_model(
        self, *, seed: int, num_layers: int, num_attention_heads: int, attention_head_dim: int, patch_size: int
    ) -> DiTTransformer2DModel:
        """A DiT for these images and classes."""
        channels, size, _ = self.shape
        check_patch_size(patch_size, size)
        return create_dit(
            generator=torch.Generator().manual_seed(seed),
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            num_embeds_ada_norm=self.num_classes,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            patch_size=patch_size,
        )

    @property
    def companions(self) -> dict[str, Any]:
        names = enumerate(self.data.class_names)
        return {"id2label": {str(label): name for label, name in names if name != f"LABEL_{label}"}}

    def check_model(self, model: DiTTransformer2DModel) -> None:
        """Raise a ValueError if a loaded model cannot take these images or classes."""
        check_dit(model, self.data, self.vae)
        self.num_classes = model.config.num_embeds_ada_norm  # its null class comes after all that it knows

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "label_dropout": self.label_dropout,
            "num_classes": self.num_classes,
            "validation": self._validation_digest,
        }

    @property
    def distillation_settings(self) -> dict[str, Any]:
        return {**self.settings, "noise_weight": self.noise_weight}

    @cached_property
    def _validation_digest(self) -> str:
        return digest((name, value) for name, value in vars(self.bank).items() if isinstance(value, Tensor))

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
            taught = predict(teacher, noisy, timesteps, labels)
        prediction = predict(student, noisy, timesteps, labels).float()
        loss = F.mse_loss(prediction, taught.float())
        if not self.noise_weight:
            return loss
        target = target_of(self.scheduler, images, noise, timesteps)
        return loss + self.noise_weight * F.mse_loss(prediction, target.float())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": self.bank.loss(model)}

    def samples(self, model: nn.Module, count: int) -> Tensor:
        """Images (count, C, H, W) in [-1, 1] of the classes in turn; the same first noise for every model."""
        model.to(self.device).eval()
        generator = seeded_generator(self.seed, 1 << 21)
        labels = self.sample_labels(count)
        images = sample(
            model,
            labels,
            self.scheduler,
            shape=self.shape,
            num_classes=self.num_classes,
            generator=generator,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        images = decode_latents(self.vae, images) if self.vae is not None else images
        images = images.mean(1, keepdim=True) if self.data.channels == 1 else images  # a VAE decodes gray to colour
        return images.clamp(-1, 1).cpu()

    def sample_labels(self, count: int) -> Tensor:
        """Labels (count,) of samples: the classes in turn."""
        return torch.tensor(self.labels, device=self.device)[torch.arange(count) % len(self.labels)]

    def real_samples(self, count: int) -> Tensor:
        """Validation images, classes in turn; a class that runs out starts again, and one that has none shows those
        that it is trained on. (One without any image is white.)"""
        shown = [self._images_of(label) for label in self.labels[:count]]
        turns = ((i // len(self.labels), shown[i % len(self.labels)]) for i in range(count))
        return torch.stack([images[turn % len(images)]["images"] for turn, images in turns])

    def _images_of(self, label: int) -> Sequence[Any]:
        """Items of a class: for validation, else to train on, else a white one."""
        for side in (self.data.validation, self.data.train):
            rows = np.flatnonzero(np.asarray(side.labels) == label).tolist()  # type: ignore[attr-defined]
            if rows:
                return Subset(side, rows)  # type: ignore[return-value]
        return [{"images": torch.ones(self.data.channels, self.data.resolution, self.data.resolution)}]

    def training_images(self) -> Tensor:
        """The images that it is trained on, (n, C, H, W) in [-1, 1]; of many a sample."""
        return self._sample(self.data.train)[0]

    @cached_property
    def _features(self) -> Any:
        return classifier_features(*self._sample(self.feature_data.train), seed=self.seed)

    def frechet_distance(self, images: Tensor) -> float:
        """Frechet distance to the validation images in the features of a small classifier (`metrics.features`)."""
        real = self._features(self._sample(self.data.validation)[0])
        return load("fid").compute(predictions=self._features(images), reference_features=real)["fid"]

    def _sample(self, dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) of all of a data set; of a larger one drawn from all of it, because it
        may be sorted by class."""
        length = len(dataset)  # type: ignore[arg-type]
        rows = torch.randperm(length, generator=seeded_generator(self.seed))[:MAX_REAL].sort().values
        items = [dataset[row] for row in rows.tolist()]
        return torch.stack([item["images"] for item in items]), torch.tensor([item["labels"] for item in items])


def model_shape(data: ImageClasses, vae: AutoencoderKL | None) -> tuple[int, int, int]:
    """(C, H, W) of what a model works on: images, or their latents.

    Raises:
        ValueError: the VAE halves the images more often than they can be halved.
    """
    if vae is None:
        return data.channels, data.resolution, data.resolution
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if data.resolution % factor:
        raise ValueError(
            f"resolution={data.resolution} is no multiple of {factor}, by which the VAE makes images smaller: take "
            f"{max(1, round(data.resolution / factor)) * factor}."
        )
    return vae.config["latent_channels"], data.resolution // factor, data.resolution // factor


def check_dit(model: DiTTransformer2DModel, data: ImageClasses, vae: AutoencoderKL | None) -> None:
    """Raise a ValueError if a loaded model cannot take these images or classes."""
    channels, size, _ = model_shape(data, vae)
    if (model.config.in_channels, model.config.sample_size) != (channels, size):
        raise ValueError(
            f"the model takes {model.config.in_channels} channels of {model.config.sample_size} pixels, the data "
            f"are {channels} channels of {size}: set resolution, or load a pipeline whose VAE makes its latents."
        )
    if model.config.num_embeds_ada_norm < len(data.class_names):
        raise ValueError(
            f"the data have {len(data.class_names)} classes, the model {model.config.num_embeds_ada_norm}."
        )
