# SPDX-License-Identifier: Apache-2.0
"""From Pillow images to the items of a torch data set, {"images": float32 (C, H, W), "labels": int}.

Pixels are in [-1, 1], or what the image processor of a model makes of them.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from .decoding import ImageKind


__all__ = ["ImageForm", "LabelledImages", "WithMirrorImages", "image_form", "labelled_images", "processed_form"]

# Up to here, images are decoded once and kept as they are made; beyond, they are decoded when they are needed.
IN_MEMORY_BYTES = 512 * 2**20


_GRAY = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_NO_RANGE = frozenset({"F", "I;32"})  # Nobody knows which number is white.


@dataclass(frozen=True)
class ImageForm:
    """What an image is made into: (channels, resolution, resolution), uint8, or float32 by a model's own processor."""

    channels: int
    resolution: int
    center_crop: bool = True
    processor: Any = None

    @property
    def num_bytes(self) -> int:
        return self.channels * self.resolution**2 * (1 if self.processor is None else 4)

    def __call__(self, image: "Image") -> np.ndarray:
        from PIL.Image import Resampling

        if self.processor is not None:
            return _processed(self.processor, image, self.channels)
        side, (width, height) = self.resolution, image.size
        size = (side, side)
        if self.center_crop:  # as transformers' processors round
            short = min(width, height)
            size = (int(side * width / short), int(side * height / short))
        image = _in_channels(image, self.channels)
        image = image if image.size == size else image.resize(size, Resampling.LANCZOS)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return np.asarray(image).reshape(side, side, self.channels).transpose(2, 0, 1)

    @property
    def as_processor(self) -> dict[str, Any]:
        """The content of the preprocessor_config.json with which transformers makes the same of an image."""
        if self.processor is not None:
            return json.loads(self.processor.to_json_string())
        side = {"height": self.resolution, "width": self.resolution}
        crop = {"size": {"shortest_edge": self.resolution}, "do_center_crop": True, "crop_size": side}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "resample": 1,  # Pillow's LANCZOS
            **(crop if self.center_crop else {"size": side, "do_center_crop": False}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * self.channels,
            "image_std": [0.5] * self.channels,
        }


def _processed(processor: Any, image: "Image", channels: int) -> np.ndarray:
    pixels = processor(images=_in_channels(image, channels), return_tensors="np")["pixel_values"][0]
    return np.asarray(pixels, np.float32)


def image_form(kinds: Collection["ImageKind"], source: str, *, resolution: int | None, center_crop: bool) -> ImageForm:
    """The one form for images of these modes and sizes: gray if all are gray, else colour.

    Args:
        source: What to call them in messages.
        resolution: `None` takes the images as they are.

    Raises:
        ValueError: They are no squares of one size, and no resolution is given; or pixels without a known range.
    """
    modes, sizes = {mode for mode, _ in kinds}, sorted({size for _, size in kinds})
    _check_range(kinds, source)
    if resolution is None:
        if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
            listed = " and of ".join(f"{width} x {height}" for width, height in sizes[:2])
            raise ValueError(f"resolution=None, but {source} has images of {listed} pixels: give one.")
        resolution = sizes[0][0]
    return ImageForm(1 if modes <= _GRAY else 3, resolution, center_crop)


def processed_form(
    kinds: Collection["ImageKind"], source: str, processor: Any, *, channels: int, resolution: int | None
) -> ImageForm:
    """The form in which a model's image processor hands images to it.

    Args:
        source: What to call them in messages.
        processor: Of transformers, as `AutoImageProcessor` loads it.
        channels: That the model takes: 1 makes all images gray, 3 makes them colour.
        resolution: That is asked for; `None`: whatever the processor makes.

    Raises:
        ValueError: Pixels without a known range; a processor that makes no squares of one size of these images, or
            of another size than is asked for, or cannot take so many channels.
    """
    from PIL import Image

    _check_range(kinds, source)
    sizes = sorted({size for _, size in kinds}, key=lambda size: size[0] / size[1])
    try:
        shapes = {_processed(processor, Image.new("RGB", size), channels).shape for size in (sizes[0], sizes[-1])}
    except ValueError as error:
        raise ValueError(f"the model's image processor cannot take images of {channels} channels: {error}") from error
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != channels or shape[1] != shape[2]:
        raise ValueError(
            f"the model's image processor makes images of the shapes {sorted({shape, *shapes})} of {source}, not "
            f"squares of one size with {channels} channels: give it another size, or crop the images."
        )
    if resolution not in (None, shape[1]):
        raise ValueError(f"resolution={resolution}: the model's image processor makes images of {shape[1]}.")
    return ImageForm(channels, shape[1], processor=processor)


def _check_range(kinds: Collection["ImageKind"], source: str) -> None:
    if unknown := sorted({mode for mode, _ in kinds} & _NO_RANGE):
        raise ValueError(
            f"{source} has images of mode {unknown}, in which no number stands for white: save them with 8 bits a "
            "channel, or gray ones with 16."
        )


def _in_channels(image: "Image", channels: int) -> "Image":
    return _eight_bits(image).convert("L" if channels == 1 else "RGB")


def _eight_bits(image: "Image") -> "Image":
    """16 bits scaled down to 8, which Pillow's own conversion would cut off at 255; other images as they are."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))


def labelled_images(
    split: "datasets.Dataset", image_column: str, labels: np.ndarray, form: ImageForm
) -> Dataset[dict[str, Any]]:
    images = _DecodedImages(split, image_column, form)
    pixels: Sequence[np.ndarray] = images
    if len(split) * form.num_bytes <= IN_MEMORY_BYTES:
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
    """Items of `pixels`, (C, H, W) each, and `labels`, (n,). Bytes are scaled to [-1, 1], other numbers stay."""

    def __init__(self, pixels: Sequence[np.ndarray], labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.pixels[index]
        pixels = torch.from_numpy(found.astype(np.float32))  # a copy
        return {"images": pixels / 127.5 - 1 if found.dtype == np.uint8 else pixels, "labels": int(self.labels[index])}


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
