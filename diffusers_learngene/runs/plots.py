# SPDX-License-Identifier: Apache-2.0
"""Three pictures: samples of several models, one row each; curves, and histograms, in small panels.

matplotlib's objects, not `pyplot`: no global state, no window system, and no import until a picture is drawn.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch


__all__ = ["curves", "histograms", "image_grid", "new_figure", "save_figure"]

# Okabe and Ito's colours: told apart by the colour-blind, too. The first is for what matters most.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
INK, FAINT = "#222222", "#DDDDDD"


def image_grid(
    rows: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    column_labels: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Draw images as a grid: one row per model, its name on the left, the labels above the columns.

    Args:
        rows: (n, C, H, W) in [-1, 1] by name, C = 1 or 3, all of one size; rows may differ in n.
        path: Of the picture; its ending says the format.
        column_labels: Above the columns, as many as there are.
        title: Above everything.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to draw.")
    images = {name: _pixels(batch) for name, batch in rows.items()}
    sizes = {batch.shape[1:] for batch in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"rows holds images of several sizes, (H, W, C) = {sorted(sizes)}: draw a grid for each.")
    height, width, channels = sizes.pop()
    columns = max(len(batch) for batch in images.values())
    if column_labels and len(column_labels) != columns:
        raise ValueError(f"column_labels has {len(column_labels)} entries for {columns} columns.")

    zoom = max(1, math.ceil(96 / max(height, width)))  # so that no viewer blurs a few pixels
    gap = max(2, zoom * max(height, width) // 16)
    cell_height, cell_width = zoom * height + gap, zoom * width + gap
    canvas = np.full((len(images) * cell_height - gap, columns * cell_width - gap, channels), 255, np.uint8)
    for row, batch in enumerate(images.values()):
        for column, image in enumerate(batch):
            top, left = row * cell_height, column * cell_width
            canvas[top : top + zoom * height, left : left + zoom * width] = image.repeat(zoom, 0).repeat(zoom, 1)

    inches = 0.62 / (zoom * max(height, width))  # per pixel of the canvas
    figure = new_figure(canvas.shape[1] * inches, canvas.shape[0] * inches)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas.repeat(3, 2) if channels == 1 else canvas, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, labeltop=True, labelbottom=False, pad=5)
    middle = zoom * np.array((height, width)) / 2 - 0.5
    axes.set_yticks([row * cell_height + middle[0] for row in range(len(images))], labels=list(images))
    axes.set_xticks([column * cell_width + middle[1] for column in range(len(column_labels))], labels=column_labels)
    if title:
        axes.set_title(title, fontsize=11, color=INK, pad=12)
    save_figure(figure, path, dpi=round(1 / inches))


def _pixels(images: torch.Tensor) -> np.ndarray:
    """(n, C, H, W) in [-1, 1] -> uint8 (n, H, W, C)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"rows has a tensor of shape {tuple(images.shape)} instead of (n, 1 or 3, H, W).")
    scaled = (images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str = "training steps",
    ylabel: str = "validation loss",
    log_y: bool = False,
) -> None:
    """Draw curves in panels side by side, with one scale and one legend for all.

    A series has the same colour in every panel. A series of a single point is a model that is not trained any further:
    a dot, and a dashed line at its level to compare with.

    Args:
        panels: {title: {series: [(x, y), ...]}}; what is not finite is left out.
        path: Of the picture; its ending says the format.
        log_y: A logarithmic vertical axis.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    if not names:
        raise ValueError("panels is empty: there is nothing to draw.")
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    dashes = {name: "-" if index < len(COLORS) else ":" for index, name in enumerate(names)}

    down = math.ceil(len(panels) / 4)
    across = math.ceil(len(panels) / down)
    figure = new_figure(max(4.8, 3.1 * across), 2.8 * down + 0.5, layout="constrained")
    grid = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for index, (axes, (title, series)) in enumerate(zip(grid, panels.items(), strict=False)):
        for name, points in series.items():
            points = [(x, y) for x, y in points if math.isfinite(y)]
            x, y = [point[0] for point in points], [point[1] for point in points]
            style = {"color": colors[name], "markersize": 4 if len(points) <= 20 else 0, "marker": "o"}
            (handles[name],) = axes.plot(x, y, label=name, linewidth=1.8, linestyle=dashes[name], **style)
            if len(points) == 1:
                axes.axhline(y[0], color=colors[name], linewidth=1, linestyle=(0, (4, 3)))
        _style_panel(axes, title)
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_tick_params(labelbottom=index + across >= len(panels))  # also above a panel left empty
        axes.xaxis.get_major_locator().set_params(integer=True)  # steps, epochs and generations are
        if log_y:
            _plain_log_axis(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(xlabel, fontsize=10, color=INK)
    figure.supylabel(ylabel, fontsize=10, color=INK)
    if len(names) > 1:
        _add_legend(figure, [handles[name] for name in names], most_columns=2 + across)
    save_figure(figure, path, dpi=150)


def histograms(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw histograms over each other in panels one below the other, with one scale and one legend for all.

    A triangle stands at the mean of a series.

    Args:
        panels: {title: {series: values}}; a series has the same colour in every panel.
        path: Of the picture; its ending says the format.
        marks: Values to draw a dashed line at, by what they are called.
    """
    every = [value for series in panels.values() for values in series.values() for value in values]
    if not every:
        raise ValueError("panels is empty: there is nothing to draw.")
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    low, high = min(every), max(every)
    edges = np.linspace(low, max(high, low + 1e-6), 31)
    figure = new_figure(6.2, 1.5 * len(panels) + 0.9, layout="constrained")
    grid = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, (title, series) in zip(grid, panels.items(), strict=True):
        for name, values in series.items():
            shares = np.histogram(values, edges)[0] / len(values)
            color = COLORS[names.index(name) % len(COLORS)]
            axes.stairs(shares, edges, fill=True, alpha=0.15, color=color)
            handles[name] = axes.stairs(shares, edges, linewidth=1.6, color=color, label=name)
            axes.plot(np.mean(values), 0, marker="^", markersize=9, color=color, clip_on=False, zorder=3)
        for name, values in (marks or {}).items():
            for value in values:
                handles[name] = axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=name)
        _style_panel(axes, title)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    figure.supxlabel(xlabel, fontsize=10, color=INK)
    _add_legend(figure, list(handles.values()), most_columns=5)
    save_figure(figure, path, dpi=150)


def _style_panel(axes: Any, title: str) -> None:
    """A panel with its title at the left, without a frame above and at the right."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=INK, labelsize=9, which="both")


def _add_legend(figure: Any, handles: Sequence[Any], *, most_columns: int) -> None:
    """One legend for all panels, above them."""
    columns, place = min(len(handles), most_columns), "outside upper center"
    figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)


def _plain_log_axis(axes: Any) -> None:
    """A logarithmic axis with a few plain numbers, 0.1 0.2 0.5 1, even where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Any:
    """A white figure of this size in inches, drawn by Agg whatever the machine is set up for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int) -> None:
    """Write the picture, without a rim; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.12)
