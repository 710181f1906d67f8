# SPDX-License-Identifier: Apache-2.0
"""Class-conditional diffusion: noise, loss, validation, samples.

What a model predicts, noise, velocity or image, is its scheduler's `prediction_type`. Written for
`DiTTransformer2DModel` and whatever is called like it: `model(x, timestep=t, class_labels=y).sample`. Images are
(N, C, H, W) tensors, pixels in [-1, 1] or scaled latents alike; the class after the last, `num_classes`, is the null
class of classifier-free guidance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from ..anatomy.dit import drop_labels
from ..runs.sampler import seeded_generator


__all__ = ["ValidationBank", "denoising_loss", "draw_noise", "noise_scheduler", "predict", "sample", "target_of"]

Model = Callable[..., Any]  # called as above: a DiT, an adapted one, or a function around one

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def noise_scheduler(latents: bool, config: Mapping[str, Any] | None = None) -> DDPMScheduler:
    """The noise of 1,000 steps: DiT's linear schedule for latents, the cosine one for pixels.

    A few pixels carry little redundancy: the linear schedule would drown them in the first third of its steps.

    Args:
        config: of the scheduler that a model was trained for, instead: its betas and its prediction type.

    Raises:
        ValueError: a scheduler of another kind of noise, such as flow matching.
    """
    if config is not None:
        name, prediction = config.get("_class_name", "DDPMScheduler"), config.get("prediction_type", "epsilon")
        if name not in KarrasDiffusionSchedulers.__members__ or prediction not in _PREDICTIONS:
            raise ValueError(
                f"the scheduler {name} of prediction_type={prediction!r} adds no noise that is trained for here: "
                f"betas, as DDPM's and DDIM's, and one of {_PREDICTIONS}."
            )
        return DDPMScheduler.from_config(config)
    if latents:
        return DDPMScheduler(beta_schedule="linear", clip_sample=False)
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)


def target_of(
    scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What a model is to predict of noised images, (N, C, H, W): noise, velocity or images, as the scheduler says."""
    prediction = scheduler.config["prediction_type"]
    if prediction == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    return noise if prediction == "epsilon" else images


def predict(model: Model, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The prediction, (N, C, H, W) as `noisy`; of a model with learned variances (2C channels), the first half.

    Args:
        noisy: (N, C, H, W).
        timesteps: (N,), whole numbers from 0 to 999.
        labels: (N,), whole numbers from 0 to the null class.
    """
    return model(noisy, timestep=timesteps, class_labels=labels).sample[:, : noisy.shape[1]]


def denoising_loss(
    model: Model,
    images: torch.Tensor,
    labels: torch.Tensor,
    scheduler: DDPMScheduler,
    generator: torch.Generator,
    *,
    num_classes: int,
    label_dropout: float = 0.1,
) -> torch.Tensor:
    """The mean squared error of the prediction at random timesteps, a scalar.

    Learned variances are neither used nor trained by it.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        generator: A CPU generator for noise, timesteps and dropped labels: the draws are the same on every device.
        label_dropout: The probability of the null class, one draw per sample.
    """
    noise, timesteps = draw_noise(images, scheduler, generator)
    labels = drop_labels(labels, label_dropout, num_classes, generator)
    noisy = scheduler.add_noise(images, noise, timesteps)
    target = target_of(scheduler, images, noise, timesteps)
    return F.mse_loss(predict(model, noisy, timesteps, labels).float(), target.float())


def draw_noise(
    images: torch.Tensor, scheduler: DDPMScheduler, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and uniform timesteps for `images`, on their device."""
    noise = randn_tensor(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    steps = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(steps, images.shape[:1], generator=generator, device=generator.device)
    return noise, timesteps.to(images.device)


class ValidationBank:
    """A fixed set of noised validation images: the same question for every model, so that small differences count.

    The timesteps are stratified: sample i of n gets one from the i-th of n equal intervals, so that their spread over
    the noise levels, which dominates the variance of a plain Monte Carlo loss, adds nothing.

    Args:
        dataset: Of {"images": (C, H, W), "labels": int}.
        scheduler: Adds the noise, and says what is to be predicted.
        num_samples: Images in the bank: evenly spread over a larger data set; of a smaller one each several times,
            with other noise.
        seed: Of noise and timesteps.
        device: Where the bank is kept.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        scheduler: DDPMScheduler,
        *,
        num_samples: int = 1024,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        length = len(dataset)  # type: ignore[arg-type]
        if num_samples < 1 or length < 1:
            raise ValueError(f"num_samples={num_samples} of a dataset of {length}: a loss needs at least one of each.")
        generator = seeded_generator(seed)
        chosen = [i * length // num_samples if length > num_samples else i % length for i in range(num_samples)]
        batch = default_collate([dataset[index] for index in chosen])
        images, self.labels = batch["images"].to(device), batch["labels"].to(device)
        noise = randn_tensor(images.shape, generator=generator, dtype=images.dtype).to(device)  # (n, C, H, W)
        strata = (torch.arange(num_samples) + torch.rand(num_samples, generator=generator)) / num_samples  # in [0, 1)
        strata = strata[torch.randperm(num_samples, generator=generator)]
        steps = scheduler.config["num_train_timesteps"]
        self.timesteps = (strata * steps).long().clamp(max=steps - 1).to(device)  # (n,)
        self.noisy = scheduler.add_noise(images, noise, self.timesteps)
        self.targets = target_of(scheduler, images, noise, self.timesteps)

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def loss(self, model: Model, batch_size: int = 512, labels: Sequence[int] | None = None) -> float:
        """The mean squared error of what `model`, in the mode it is in, predicts with the true labels.

        Args:
            labels: of images of these classes only.
        """
        chosen = torch.arange(len(self), device=self.labels.device)
        if labels is not None:
            chosen = chosen[torch.isin(self.labels, torch.tensor(labels, device=self.labels.device))]
        total = 0.0
        for rows in chosen.split(batch_size):
            predicted = predict(model, self.noisy[rows], self.timesteps[rows], self.labels[rows])
            total += F.mse_loss(predicted.float(), self.targets[rows].float()).item() * len(rows)
        return total / len(chosen)


@torch.no_grad()
def sample(
    model: Model,
    labels: torch.Tensor,
    scheduler: DDPMScheduler,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    generator: torch.Generator,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Images of the classes `labels`, (N, C, H, W), by DDIM with classifier-free guidance as in `DiTPipeline`.

    Args:
        labels: (N,), on the model's device.
        scheduler: The one trained with; DDIM takes over its noise levels and prediction type.
        shape: (C, H, W) of an image, or of a latent (then `data.decode_latents` makes images of them).
        num_classes: The null class.
        generator: Of the first noise; the rest is deterministic. Of the CPU: the same noise on every device.
        num_inference_steps: Calls of the model.
        guidance_scale: 1 samples without guidance, at half the cost.
    """
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(num_inference_steps)
    guided = guidance_scale > 1
    images = randn_tensor((len(labels), *shape), generator=generator, device=labels.device)
    both = torch.cat([labels, torch.full_like(labels, num_classes)]) if guided else labels  # (2N,) or (N,)
    for timestep in ddim.timesteps:
        inputs = torch.cat([images, images]) if guided else images
        output = predict(model, inputs, timestep.to(labels.device).expand(len(inputs)), both)
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        images = ddim.step(output, timestep, images).prev_sample
    return images
