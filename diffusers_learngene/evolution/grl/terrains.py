# SPDX-License-Identifier: Apache-2.0
"""Four terrains of 120 x 40 m as height fields, and a flat one: numpy only.

A field has 600 rows (y from -60 to 60 m, the way that the ant goes) and 200 columns (x from -20 to 20 m), cells of
0.2 m. The first 100 rows are flat; a wall of 1.8 m surrounds the field. Positions and sizes are those of the authors'
code (their numbers are stretched by 1.5 by the simulator, and so are ours). Two things differ: the pits of `bumpy`
were below the bottom of a field as MuJoCo defines it, and an agent could fall through; the environment lifts the whole
field instead. And where the code draws or lists more than can be told in a few numbers (some late ridges of `bumpy`,
the order of small and large rubble) ours are regular.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


__all__ = ["LENGTH", "TERRAINS", "WIDTH", "height_field"]

ROWS, COLUMNS, CELL = 600, 200, 0.2
LENGTH, WIDTH = ROWS * CELL, COLUMNS * CELL  # metres
WALL_CELLS, WALL = 5, 1.2
STRETCH = 1.5  # metres of height by number below

Profile = NDArray[np.float64]

# Row, width, height.
_SINES = (
    *((100, 50, 0.4), (150, 30, 0.2), (180, 20, 0.15), (200, 20, 0.2), (220, 20, 0.25), (260, 50, 0.5)),
    *((330, 50, 0.6), (380, 20, 0.2), (400, 20, 0.15), (420, 30, 0.15), (450, 50, 0.5), (500, 20, 0.3)),
    *((520, 20, 0.2), (540, 30, 0.3)),
)
# Row, height; each is ten rows long.
_RIDGES = (
    *((100, 0.2), (110, 0.12), (120, 0.12), (130, 0.12), (145, -0.12), (160, -0.12), (180, 0.2), (190, 0.16)),
    *((200, -0.16), (215, -0.16), (225, -0.16), (250, 0.2), (260, 0.24), (270, 0.2), (300, -0.16), (320, 0.24)),
    *((340, -0.2), (360, 0.24), (400, -0.16), (420, 0.2), (435, -0.2), (450, 0.24), (465, -0.16), (480, 0.24)),
    *((490, -0.2),),
)
_RIDGE = np.array([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2])
_BIG_RUBBLE = [index % 4 > 0 for index in range(23)]  # 17 rows of 20 cells and 6 of 10: 400, gaps included


def height_field(terrain: str) -> NDArray[np.float64]:
    """Heights in metres, (600, 200): rows along y, columns along x; the flat ground is 0, pits are below.

    Args:
        terrain: "step", "curve", "bumpy", "rubble" or "flat".

    Raises:
        ValueError: another one.
    """
    if terrain not in TERRAINS:
        raise ValueError(f"terrain={terrain!r} is not one of {list(TERRAINS)}.")
    field = TERRAINS[terrain]()
    for border in (np.s_[:WALL_CELLS], np.s_[-WALL_CELLS:], np.s_[:, :WALL_CELLS], np.s_[:, -WALL_CELLS:]):
        field[border] = WALL
    return STRETCH * field


def _across(profile: Profile) -> NDArray[np.float64]:
    """The same height over the whole width."""
    return np.repeat(profile[:, None], COLUMNS, axis=1)


def _flat() -> NDArray[np.float64]:
    return np.zeros((ROWS, COLUMNS))


def _step() -> NDArray[np.float64]:
    """Three staircases, up and down."""
    profile = np.zeros(ROWS)
    for start, tread, riser, steps in ((100, 15, 0.1, 5), (260, 15, 0.13, 4), (390, 10, 0.1, 7)):
        heights = riser * np.array([*range(1, steps + 1), *range(steps - 1, 0, -1)])
        profile[start : start + tread * len(heights)] = np.repeat(heights, tread)
    return _across(profile)


def _curve() -> NDArray[np.float64]:
    """Humps of half a sine wave."""
    profile = np.zeros(ROWS)
    for start, width, height in _SINES:
        profile[start : start + width] = height * np.sin(np.pi * np.arange(width) / (width - 1))
    return _across(profile)


def _bumpy() -> NDArray[np.float64]:
    """Ridges and grooves."""
    profile = np.zeros(ROWS)
    for start, height in _RIDGES:
        profile[start : start + len(_RIDGE)] = height * _RIDGE
    return _across(profile)


def _rubble() -> NDArray[np.float64]:
    """23 rows of square stepped pyramids, small ones of 8 and big ones of 18 cells, higher the farther they are."""
    field, row = _flat(), 101
    for index, big in enumerate(_BIG_RUBBLE):
        side, low, high = (18, 0.225, 0.45) if big else (8, 0.1, 0.2)
        rings = np.minimum(np.arange(side), np.arange(side)[::-1])
        pyramid = (1 + np.minimum.outer(rings, rings)) / (side // 2)
        height = low + (high - low) * index / (len(_BIG_RUBBLE) - 1)
        inside = COLUMNS - 2 * WALL_CELLS
        pieces = inside // (side + 2)
        left = WALL_CELLS + (inside - pieces * (side + 2)) // 2
        for column in range(left, left + pieces * (side + 2), side + 2):
            field[row : row + side, column : column + side] = height * pyramid
        row += side + 2
    return field


TERRAINS: dict[str, Callable[[], NDArray[np.float64]]] = {
    "step": _step,
    "curve": _curve,
    "bumpy": _bumpy,
    "rubble": _rubble,
    "flat": _flat,
}
