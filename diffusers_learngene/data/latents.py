# SPDX-License-Identifier: Apache-2.0
"""Latents: images as an autoencoder's small, scaled tensors, computed once before training, and back.

`scaled = (mean - shift_factor) * scaling_factor` with the VAE's own factors: about unit variance, as noise schedules
expect. The mean, not a sample: the VAE's own noise is far below the smallest noise of the diffusion.
"""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..hub.files import write_tensors


__all__ = ["CachedLatents", "cache_latents", "decode_latents", "encode_images"]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, c, h, w), float32 on the VAE's device, of images (N, C or 1, H, W) in [-1, 1]."""
    images = images.to(vae.device, vae.dtype).expand(-1, vae.config["in_channels"], -1, -1)
    mean = vae.encode(images).latent_dist.mode().float()
    return (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Images (N, C, H, W) in [-1, 1], float32 on the VAE's device, of scaled latents (N, c, h, w)."""
    latents = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    parts = [vae.decode(part).sample.float() for part in latents.to(vae.device, vae.dtype).split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)


class CachedLatents(Dataset[dict[str, Any]]):
    """Items {"images": float32 (c, h, w), "labels": int} of latents (n, c, h, w), any precision, and labels (n,)."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor) -> None:
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": self.latents[index].float(), "labels": int(self.labels[index])}


def cache_latents(
    vae: AutoencoderKL, dataset: Dataset[Any], *, path: str | os.PathLike[str] | None = None, batch_size: int = 32
) -> CachedLatents:
    """Encode a whole data set, or read what was encoded before.

    With several processes, let one write the file: `with accelerator.main_process_first(): cache_latents(...)`.

    Args:
        vae: In the mode, precision and on the device it is to work with.
        dataset: Items {"images": (C, H, W) in [-1, 1], "labels": int}.
        path: A safetensors file, read if it exists (its pages are loaded when they are used), written if not.
        batch_size: Images encoded at once.

    Raises:
        ValueError: When the file is of other images, or of another VAE: a few are encoded anew and compared.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if path is not None and Path(path).exists():
        cached = load_file(path)
        probe = sorted({0, length // 2, length - 1})
        batch = next(iter(DataLoader(Subset(dataset, probe), batch_size=len(probe))))
        latents = encode_images(vae, batch["images"]).cpu()
        if (
            len(cached["labels"]) != length
            or not torch.equal(cached["labels"][probe], batch["labels"])
            or cached["latents"].shape[1:] != latents.shape[1:]
            or not torch.allclose(cached["latents"][probe].float(), latents, atol=0.05, rtol=0.05)
        ):
            raise ValueError(
                f"path={str(path)!r} holds latents of other images or of another VAE: delete it, or name another."
            )
        return CachedLatents(cached["latents"], cached["labels"])

    encoded, labels = [], []
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size), desc="encode images", delay=2):
        encoded.append(encode_images(vae, batch["images"]).half().cpu().contiguous())
        labels.append(batch["labels"])
    tensors = {"latents": torch.cat(encoded), "labels": torch.cat(labels)}
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(Path(path), tensors)
    return CachedLatents(tensors["latents"], tensors["labels"])
