# SPDX-License-Identifier: Apache-2.0
"""All images of a source are opened once, before anything starts: which are broken, and what the others are.

What they are decides what they are made into (`images.py`), whichever of them a seed draws for training.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from tqdm.auto import tqdm


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageKind", "whole_images"]

ImageKind = tuple[str, tuple[int, int]]  # Pillow's mode and size


def whole_images(
    splits: Mapping[str, "datasets.Dataset"], image_column: str, source: str, broken_images: str
) -> tuple[dict[str, "datasets.Dataset"], set[ImageKind]]:
    """The splits without what cannot be decoded, be it in files, in archives or in a table; and what images there are.

    Args:
        source: What to call it in messages.
        broken_images: "error", or "skip" to go on without them.

    Raises:
        ValueError: Images are broken and not to be skipped, or nothing is left of a split.
    """
    import datasets

    whole: dict[str, datasets.Dataset] = {}
    kinds: set[ImageKind] = set()
    broken: list[str] = []
    for name, split in splits.items():
        files = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        found: list[ImageKind | None] = []
        with ThreadPoolExecutor() as threads, tqdm(desc="check images", total=len(files), delay=2) as progress:
            for batch in files.iter(batch_size=256):
                opened = list(threads.map(_kind, batch[image_column]))
                names = [(row or {}).get("path") for row in batch[image_column]]
                broken += [
                    path or f"{name}[{len(found) + index}]"
                    for index, (path, kind) in enumerate(zip(names, opened, strict=True))
                    if kind is None
                ]
                found += opened
                progress.update(len(opened))
        whole[name] = split if all(found) else split.select(np.flatnonzero([kind is not None for kind in found]))
        kinds |= {kind for kind in found if kind is not None}
    if broken:
        listed = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        message = f"{source}: {len(broken)} images cannot be decoded: {listed}"
        if broken_images == "error" or not all(len(split) for split in whole.values()):
            raise ValueError(f"{message}. Mend or delete them, or leave them out with broken_images='skip'.")
        datasets.utils.logging.get_logger(__name__).warning(f"{message}. They are left out.")
    return whole, kinds


def _kind(row: dict[str, Any] | None) -> ImageKind | None:
    """Mode and size of an image, {"bytes": ..., "path": ...} as `datasets` has it; None if it cannot be decoded."""
    from PIL import Image

    try:
        assert row is not None
        opened = fsspec.open(row["path"]) if row["bytes"] is None else nullcontext(BytesIO(row["bytes"]))
        with opened as file, Image.open(file) as image:
            kind = image.mode, image.size
            image.draft("L", (1, 1))  # lets JPEG be read to its end without being computed in full
            image.load()
            if kind[0] == "I" and (np.asarray(image) >> 16).any():  # negative, or more than 16 bits
                return "I;32", kind[1]
    except Exception:  # Pillow's formats raise many things: OSError, SyntaxError, struct.error, DecompressionBombError
        return None
    return kind
