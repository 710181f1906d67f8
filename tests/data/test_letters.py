# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font

from diffusers_learngene.data.letters import CHARACTERS, FONTS, _glyphs, load_letters


@pytest.fixture(scope="module")
def letters():
    return load_letters(6, resolution=28)


def test_what_is_made(letters):
    assert len(letters.class_names) == 100 and letters.channels == 1 and letters.resolution == 28
    assert len(letters.train) == 400 and len(letters.validation) == 200
    for part, each in ((letters.train, 4), (letters.validation, 2)):
        assert np.bincount(part.labels).tolist() == [each] * 100
    image = letters.train[0]["images"]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and image.min() == -1 and image.max() > 0.5


def test_it_is_seeded(letters):
    again, other = load_letters(6, resolution=28), load_letters(6, resolution=28, seed=1)
    assert np.array_equal(letters.train.pixels, again.train.pixels)
    assert not np.array_equal(letters.train.pixels, other.train.pixels)


@pytest.mark.parametrize("font", FONTS)
def test_no_font_lacks_a_character(font):
    known = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))).get_charmap()
    assert not [character for character in CHARACTERS if ord(character) not in known]


def test_no_two_classes_look_the_same():
    """In no font do the undistorted glyphs of two characters cover each other; nor does one leave its square."""
    glyphs = F.avg_pool2d(_glyphs(), 4)
    for column, font in enumerate(FONTS):
        flat = F.normalize(glyphs[:, column].flatten(1), dim=1)
        similar = (flat @ flat.T).fill_diagonal_(0)
        one, other = divmod(similar.argmax().item(), len(CHARACTERS))
        assert similar.max() < 0.985, (font, CHARACTERS[one], CHARACTERS[other], similar.max().item())
    assert _glyphs()[..., 0].max() == _glyphs()[..., 0, :].max() == 0 and (_glyphs().amax((2, 3)) > 0.9).all()


def test_no_class_is_cut_off(letters):
    """The distortion leaves nearly all ink inside of the image."""
    edge = torch.from_numpy(letters.train.pixels).float()
    rim = edge.clone()
    rim[..., 1:-1, 1:-1] = 0
    assert rim.sum() / edge.sum() < 0.02
