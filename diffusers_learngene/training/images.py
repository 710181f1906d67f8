# SPDX-License-Identifier: Apache-2.0
"""From Pillow images to the items of a torch data set, {"images": float32 (C, H, W) in [-1, 1], "labels": int}."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image


__all__ = ["ImageForm", "LabelledImages", "WithMirrorImages", "labelled_images"]

# Up to here, images are decoded once and kept as bytes; beyond, they are decoded when they are needed.
IN_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ImageForm:
    """What an image is made into: uint8 (channels, resolution, resolution). `exact`: nothing is to be resized."""

    channels: int
    resolution: int
    center_crop: bool
    exact: bool

    def __call__(self, image: "Image") -> np.ndarray:
        from PIL import ImageOps
        from PIL.Image import Resampling

        size = (self.resolution, self.resolution)
        if image.size != size and self.exact:
            raise ValueError(
                f"resolution=None, but there are images of {self.resolution} x {self.resolution} and of "
                f"{image.width} x {image.height} pixels: give a resolution."
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != size and self.center_crop:
            image = ImageOps.fit(image, size, Resampling.LANCZOS)
        elif image.size != size:
            image = image.resize(size, Resampling.LANCZOS)
        return np.asarray(image).reshape(*size, self.channels).transpose(2, 0, 1)


def labelled_images(
    split: "datasets.Dataset", image_column: str, labels: np.ndarray, form: ImageForm
) -> Dataset[dict[str, Any]]:
    images = _DecodedImages(split, image_column, form)
    pixels: Sequence[np.ndarray] = images
    if len(split) * form.channels * form.resolution**2 <= IN_MEMORY_BYTES:
        pixels = np.stack([images[i] for i in tqdm(range(len(split)), desc="decode images", delay=2)])  # type: ignore[assignment]
    return LabelledImages(pixels, labels)


class _DecodedImages(Sequence[np.ndarray]):
    """Images of a `datasets.Dataset`, decoded when they are asked for."""

    def __init__(self, split: "datasets.Dataset", image_column: str, form: ImageForm) -> None:
        self.column, self.form = split.select_columns([image_column]), form
        self.image_column = image_column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        return self.form(self.column[index][self.image_column])


class LabelledImages(Dataset[dict[str, Any]]):
    """Items of `pixels`, uint8 (C, H, W) each, and `labels`, (n,)."""

    def __init__(self, pixels: Sequence[np.ndarray], labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.from_numpy(self.pixels[index].astype(np.float32))
        return {"images": pixels / 127.5 - 1, "labels": int(self.labels[index])}


class WithMirrorImages(Dataset[dict[str, Any]]):
    """A data set of n images followed by their n mirror images."""

    def __init__(self, images: Dataset[dict[str, Any]]) -> None:
        self.images = images

    @property
    def labels(self) -> np.ndarray:
        return np.tile(self.images.labels, 2)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return 2 * len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        mirrored, index = divmod(index, len(self.images))  # type: ignore[arg-type]
        if mirrored > 1:
            raise IndexError(index)
        item = self.images[index]
        return {**item, "images": item["images"].flip(-1)} if mirrored else item
