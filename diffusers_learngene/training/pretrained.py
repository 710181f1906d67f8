# SPDX-License-Identifier: Apache-2.0
"""Trained models that are brought, and what lies beside them: schedules, autoencoders, labels, image processors."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from ..data.labels import label_names
from .diffusion import noise_scheduler
from .tasks import first_line


__all__ = ["PretrainedDiT", "load_classifier", "load_dit", "load_image_processor"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedDiT:
    """A `DiTPipeline` taken apart, or a bare DiT.

    Attributes:
        vae: None of a bare DiT, which works on pixels.
        scheduler: of the noise that it was trained for; None of a bare DiT.
        labels: names of its labels, by id; "LABEL_3" where none is known.
    """

    transformer: DiTTransformer2DModel
    vae: AutoencoderKL | None
    scheduler: DDPMScheduler | None
    labels: Sequence[str]

    @property
    def resolution(self) -> int:
        """Pixels of the images that it makes."""
        size = self.transformer.config.sample_size
        return size if self.vae is None else size * 2 ** (len(self.vae.config["block_out_channels"]) - 1)


def load_dit(
    pretrained_model_name_or_path: str, *, revision: str | None = None, variant: str | None = None
) -> PretrainedDiT:
    """A DiT from a `DiTPipeline`, with its VAE, schedule and labels, or a bare one; folder or Hub id.

    Raises:
        ValueError: neither is there, or a pipeline of another kind of noise.
    """
    name = pretrained_model_name_or_path

    def load(cls: Any, subfolder: str | None = None) -> Any:
        model, loading = cls.from_pretrained(
            name,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
        )
        if missing := loading["missing_keys"]:
            raise ValueError(
                f"pretrained_model_name_or_path={name!r} is no {cls.__name__}: it lacks {sorted(missing)[:3]}."
            )
        return model

    try:
        # Asked first: where a folder lacks a subfolder, `from_pretrained` takes the files beside it instead.
        index = _pipeline_index(name, revision)
        if index is None:
            _logger.warning(
                "%r is a bare DiT, with no scheduler and no names of its labels beside it: the schedule is the one "
                "that models are trained with here. A DiTPipeline's folder has all three.",
                name,
            )
            transformer = load(DiTTransformer2DModel)
            return PretrainedDiT(transformer, None, None, label_names(None, transformer.config.num_embeds_ada_norm))
        config = DDPMScheduler.load_config(name, subfolder="scheduler", revision=revision)
        transformer, vae = load(DiTTransformer2DModel, "transformer"), load(AutoencoderKL, "vae")
    except OSError as error:
        raise ValueError(
            f"pretrained_model_name_or_path={name!r} holds neither a DiTPipeline nor a DiTTransformer2DModel: "
            f"{first_line(error)}"
        ) from error
    if not index.get("id2label"):
        _logger.warning("the model_index.json of %r has no id2label: its labels have no names.", name)
    labels = label_names(index.get("id2label"), transformer.config.num_embeds_ada_norm)
    return PretrainedDiT(transformer, vae, noise_scheduler(latents=True, config=config), labels)


def _pipeline_index(name: str, revision: str | None) -> dict[str, Any] | None:
    """What model_index.json says; None where there is none."""
    try:
        return dict(DiTPipeline.load_config(name, revision=revision))
    except OSError:
        return None


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
            name,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            **options,
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


def load_image_processor(pretrained_model_name_or_path: str, *, revision: str | None = None) -> Any:
    """The image processor that lies beside a model; None where there is none, which is logged.

    Raises:
        ValueError: there is one that cannot be used, such as one that comes with code of its own.
    """
    name, options = pretrained_model_name_or_path, {"revision": revision or "main"}
    if not get_image_processor_config(name, **options):
        _logger.warning(
            "%r has no image processor (preprocessor_config.json): images are cropped, resized and scaled to [-1, 1] "
            "as for models that are trained here.",
            name,
        )
        return None
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"pretrained_model_name_or_path={name!r} has an image processor that cannot be used: {first_line(error)}"
        ) from error
