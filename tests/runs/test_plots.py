# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_learngene.runs.plots import curves, histograms, image_grid


def test_a_grid_shows_every_pixel_as_a_square(tmp_path):
    gray = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    image_grid({"real": gray.repeat(3, 1, 1, 1), "model": gray}, tmp_path / "new" / "grid.png", column_labels="abc")
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("L"))
    levels = ((gray + 1) * 127.5).round().byte().unique().tolist()
    areas = [(pixels == level).sum() for level in levels[5:50:5]]  # no text has these grays throughout
    assert min(areas) >= 4 * 11 * 11 and max(pixels.shape) < 1200


def test_curves_are_drawn(tmp_path):
    panels = {
        f"{depth} layers": {"descended": [(0, 0.15)], "scratch": [(0, 1.0), (100, float("nan")), (200, 0.2)]}
        for depth in range(5)
    }
    for log_y in (False, True):
        curves(panels, tmp_path / "curves.png", log_y=log_y)
        image = Image.open(tmp_path / "curves.png").convert("RGB")
        colors = {color for count, color in image.getcolors(1 << 20) if count > 50}
        assert {(0, 114, 178), (213, 94, 0)} <= colors


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ({}, (), "rows is empty"),
        ({"a": torch.zeros(2, 8, 8)}, (), r"\(2, 8, 8\) instead of"),
        ({"a": torch.zeros(2, 1, 8, 8), "b": torch.zeros(2, 1, 4, 4)}, (), "several sizes"),
        ({"a": torch.zeros(2, 1, 8, 8)}, "abc", "3 entries for 2 columns"),
    ],
)
def test_errors(tmp_path, rows, labels, message):
    with pytest.raises(ValueError, match=message):
        image_grid(rows, tmp_path / "grid.png", column_labels=labels)
    with pytest.raises(ValueError, match="panels is empty"):
        curves({"panel": {}}, tmp_path / "curves.png")


def test_histograms(tmp_path):
    values = {"one": [0.1, 0.2, 0.2], "other": [0.5]}
    histograms({"a": values, "b": {"one": [0.3]}}, tmp_path / "h.png", xlabel="cosine", marks={"theta": [0.5]})
    assert (tmp_path / "h.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        histograms({}, tmp_path / "h.png", xlabel="cosine")
