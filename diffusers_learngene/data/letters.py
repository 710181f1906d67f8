# SPDX-License-Identifier: Apache-2.0
"""A few-shot data set that is made, not downloaded: 100 letter forms in the fonts that ship with matplotlib.

Omniglot's idea. A class is a character: Latin, Greek, Cyrillic, digits and signs, of which no two look the same (so
there is no Greek Alpha beside the Latin A, and no zero beside the O). An image is the character in one of nine upright
or slanted fonts under a random affine map: turned, sheared, scaled and moved.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..runs.sampler import seeded_generator
from .image_classes import ImageClasses
from .images import LabelledImages


__all__ = ["CHARACTERS", "FONTS", "load_letters"]

CHARACTERS = "".join(
    (
        "23456789",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "abdefhjmnrty",
        "ΓΔΘΞΠΣΦΨΩ",
        "αβδεζλμξσω",
        "БДЖИЦЧШЫЭЮЯЪЉЊЂ",
        "&@#%?¿≠→*$€£¥§¶∞√∂∇÷",
    )
)
# Without italics proper, in which an a is an alpha; each of these has all the characters.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
)
_GLYPH = 64  # pixels of the square that a character is drawn in, before it is distorted


def load_letters(
    images_per_class: int = 60, *, resolution: int = 28, validation_fraction: float = 1 / 3, seed: int = 0
) -> ImageClasses:
    """100 classes of gray images, white on black, made on the spot in a few seconds.

    Args:
        images_per_class: training and validation together.
        resolution: height and width in pixels.
        validation_fraction: of the images of every class; these are the last ones.
        seed: of fonts and distortions. The images of one seed are the same on every machine, but for rounding.
    """
    count = len(CHARACTERS) * images_per_class
    draws = seeded_generator(seed)
    labels = torch.arange(len(CHARACTERS)).repeat_interleave(images_per_class)
    glyphs = _glyphs()[labels, torch.randint(len(FONTS), (count,), generator=draws)]
    pixels = _distort(glyphs, resolution, draws).numpy()
    place = np.arange(count) % images_per_class
    train = place < round(images_per_class * (1 - validation_fraction))
    return ImageClasses(
        train=LabelledImages(pixels[train], labels.numpy()[train]),  # type: ignore[arg-type]
        validation=LabelledImages(pixels[~train], labels.numpy()[~train]),  # type: ignore[arg-type]
        class_names=list(CHARACTERS),
        channels=1,
        resolution=resolution,
    )


@cache
def _glyphs() -> torch.Tensor:
    """(characters, fonts, 64, 64) in [0, 1]: each drawn once, in the middle, the taller or wider side 44 pixels."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = np.zeros((len(CHARACTERS), len(FONTS), _GLYPH, _GLYPH), np.uint8)
    for column, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 96)
        for row, character in enumerate(CHARACTERS):
            left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
            image = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
            zoom = 44 / max(image.size)
            image = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
            corner = ((_GLYPH - image.width) // 2, (_GLYPH - image.height) // 2)
            canvas = Image.new("L", (_GLYPH, _GLYPH))
            canvas.paste(image, corner)
            glyphs[row, column] = np.asarray(canvas)
    return torch.from_numpy(glyphs).float() / 255


def _distort(glyphs: torch.Tensor, resolution: int, draws: torch.Generator) -> torch.Tensor:
    """uint8 (n, 1, resolution, resolution) of (n, 64, 64): up to 25 degrees, 0.3 of shear, 0.75 to 1.2 in size."""
    count = len(glyphs)

    def uniform(low: float, high: float, size: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, size, generator=draws)

    turn, shear = uniform(-25, 25)[:, 0].deg2rad(), uniform(-0.3, 0.3)[:, 0]
    scale, move = uniform(0.75, 1.2, 2), uniform(-0.15, 0.15, 2)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    stretch = torch.eye(2).repeat(count, 1, 1)
    stretch[:, 0, 1] = shear
    # From the new image to the old.
    maps = torch.cat([rotation @ stretch / scale[:, :, None], move[:, :, None]], dim=2)
    # Four times too large, and then averaged: no jagged edges.
    fine = F.affine_grid(maps, [count, 1, 2 * resolution, 2 * resolution], align_corners=False)
    images = F.grid_sample(glyphs[:, None], fine, align_corners=False)
    return (F.avg_pool2d(images, 2) * 255).round().byte()
