# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from diffusers_learngene.anatomy.dit import create_dit
from diffusers_learngene.data.latents import decode_latents
from diffusers_learngene.training.diffusion import (
    ValidationBank,
    denoising_loss,
    draw_noise,
    noise_scheduler,
    predict,
    sample,
)


CONFIG = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_dit(**config):
    model, draws = create_dit(**{**CONFIG, **config}), generator(1)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draws)
    return model.eval()


def images_of(length, channels=1):
    draws = generator(2)
    return [{"images": torch.rand(channels, 8, 8, generator=draws) * 2 - 1, "labels": i % 10} for i in range(length)]


def test_schedules():
    pixels, latents = noise_scheduler(latents=False), noise_scheduler(latents=True)
    assert pixels.config.clip_sample and not latents.config.clip_sample
    assert latents.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert pixels.alphas_cumprod[500] > 4 * latents.alphas_cumprod[500]


def test_of_learned_variances_the_noise_is_taken():
    model = random_dit(in_channels=1, out_channels=2)
    noisy, timesteps, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1])
    noise = predict(model, noisy, timesteps, labels)
    assert torch.equal(noise, model(noisy, timestep=timesteps, class_labels=labels).sample[:, :1])


def test_the_loss_is_a_function_of_the_generator():
    model, scheduler = random_dit(in_channels=1), noise_scheduler(latents=False)
    images, labels = torch.zeros(6, 1, 8, 8), torch.arange(6)

    def loss(seed):
        return denoising_loss(model, images, labels, scheduler, generator(seed), num_classes=10).item()

    assert loss(0) == loss(0) != loss(1)
    zero = create_dit(**CONFIG, in_channels=1)  # predicts no noise at all
    many = denoising_loss(zero, images.expand(-1, 1, 8, 8), labels, scheduler, generator(), num_classes=10)
    assert many.item() == pytest.approx(1, abs=0.2)


def test_labels_are_dropped_once_per_sample():
    seen = {}

    def model(noisy, timestep, class_labels):
        seen["labels"] = class_labels
        return SimpleNamespace(sample=noisy)

    arguments = (torch.zeros(1000, 1, 2, 2), torch.arange(1000) % 10, noise_scheduler(latents=True), generator())
    denoising_loss(model, *arguments, num_classes=10, label_dropout=0.3)
    assert (seen["labels"] == 10).float().mean() == pytest.approx(0.3, abs=0.05)


def test_timesteps_and_noise_cover_everything():
    noise, timesteps = draw_noise(torch.zeros(5000, 1, 2, 2), noise_scheduler(latents=True), generator())
    assert timesteps.min() < 5 and timesteps.max() > 994 and noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("length", "num_samples"), [(7, 40), (40, 40), (90, 40)])
def test_the_bank_is_fixed_and_stratified(length, num_samples):
    scheduler = noise_scheduler(latents=False)
    bank = ValidationBank(images_of(length), scheduler, num_samples=num_samples)
    again = ValidationBank(images_of(length), scheduler, num_samples=num_samples)
    assert torch.equal(bank.noisy, again.noisy) and len(bank) == num_samples
    assert (bank.timesteps.sort().values // 25).tolist() == list(range(40))
    assert not torch.equal(bank.noisy, ValidationBank(images_of(length), scheduler, num_samples=40, seed=1).noisy)
    model = random_dit(in_channels=1)
    assert bank.loss(model, batch_size=7) == pytest.approx(bank.loss(model), rel=1e-5)


def test_the_bank_gives_a_perfect_model_zero():
    bank = ValidationBank(images_of(12), noise_scheduler(latents=True), num_samples=12)
    answers = {noisy.sum().item(): noise for noisy, noise in zip(bank.noisy, bank.targets, strict=True)}

    def oracle(noisy, timestep, class_labels):
        return SimpleNamespace(sample=torch.stack([answers[image.sum().item()] for image in noisy]))

    assert bank.loss(oracle) == 0
    with pytest.raises(ValueError, match="num_samples=0"):
        ValidationBank(images_of(3), noise_scheduler(latents=True), num_samples=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_samples_are_those_of_the_stock_pipeline(guidance_scale, out_channels):
    torch.manual_seed(0)
    model, scheduler = random_dit(out_channels=out_channels), noise_scheduler(latents=True)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": guidance_scale}
    expected = pipe([1, 7, 999], generator=generator(), output_type="pt", **settings).images
    latents = sample(
        model,
        torch.tensor([1, 7, 999]),
        scheduler,
        shape=(4, 8, 8),
        num_classes=1000,
        generator=generator(),
        **settings,
    )
    torch.testing.assert_close(decode_latents(vae, latents) / 2 + 0.5, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_is_predicted_is_the_schedulers(prediction):
    """A model that knows the answer has no loss, and its samples are the images that it knows."""
    own = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=prediction)
    scheduler = noise_scheduler(latents=True, config=own.config)
    image = torch.rand(1, 8, 8, generator=generator()) * 2 - 1
    alphas = scheduler.alphas_cumprod

    def oracle(noisy, timestep, class_labels):
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()
        answers = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * image}
        return SimpleNamespace(sample=answers.get(prediction, image.expand_as(noisy)))

    items = [{"images": image, "labels": 0}] * 4
    assert ValidationBank(items, scheduler, num_samples=8).loss(oracle) == pytest.approx(0, abs=1e-6)
    batch = (image.expand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long), scheduler, generator())
    assert denoising_loss(oracle, *batch, num_classes=10).item() == pytest.approx(0, abs=1e-6)
    settings = {"shape": (1, 8, 8), "num_classes": 10, "generator": generator(), "num_inference_steps": 20}
    found = sample(oracle, torch.zeros(2, dtype=torch.long), scheduler, **settings, guidance_scale=2)
    torch.testing.assert_close(found, image.expand_as(found), atol=2e-2, rtol=0)
