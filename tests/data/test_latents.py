# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_learngene.data.latents import cache_latents, decode_latents, encode_images


def tiny_vae(seed=0, **config):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    ).eval()


@pytest.fixture
def images():
    draws = torch.Generator().manual_seed(0)
    return [{"images": torch.rand(3, 8, 8, generator=draws) * 2 - 1, "labels": i % 3} for i in range(7)]


def test_latents_are_scaled_means(images):
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.25)
    batch = torch.stack([item["images"] for item in images])
    latents = encode_images(vae, batch)
    with torch.no_grad():
        mean = vae.encode(batch).latent_dist.mean
        decoded = vae.decode(mean).sample.clamp(-1, 1)
    assert latents.shape == (7, 4, 4, 4)
    torch.testing.assert_close(latents, (mean - 0.25) * 0.5)
    torch.testing.assert_close(decode_latents(vae, latents, batch_size=3), decoded)
    assert encode_images(vae, batch[:, :1]).shape == latents.shape  # gray


def test_what_is_cached_is_what_is_encoded(images, tmp_path):
    vae, path = tiny_vae(), tmp_path / "new" / "latents.safetensors"
    fresh = cache_latents(vae, images, batch_size=3)
    written = cache_latents(vae, images, path=path)
    modified = path.stat().st_mtime_ns
    read = cache_latents(vae, images, path=path)
    assert path.stat().st_mtime_ns == modified and [file.name for file in path.parent.iterdir()] == [path.name]
    for i, item in enumerate(images):
        expected = encode_images(vae, item["images"][None])[0]
        for cached in (fresh, written, read):
            torch.testing.assert_close(cached[i]["images"], expected, atol=1e-2, rtol=1e-2)
            assert cached[i]["images"].dtype == torch.float32 and cached[i]["labels"] == item["labels"]


def test_a_cache_of_something_else_is_refused(images, tmp_path):
    path = tmp_path / "latents.safetensors"
    cache_latents(tiny_vae(), images, path=path)
    others = {
        "fewer": (tiny_vae(), images[:-1]),
        "order": (tiny_vae(), images[::-1]),
        "VAE": (tiny_vae(seed=1), images),
        "size": (tiny_vae(), [{**item, "images": item["images"][:, :4, :4]} for item in images]),
    }
    for vae, dataset in others.values():
        with pytest.raises(ValueError, match="of other images or of another VAE"):
            cache_latents(vae, dataset, path=path)
