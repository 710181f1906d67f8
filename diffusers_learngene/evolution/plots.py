# SPDX-License-Identifier: Apache-2.0
"""The picture of a lineage: every newborn by generation and fitness, and the line that leads to one of them."""

import os
from collections.abc import Sequence

from ..runs.plots import COLORS, FAINT, INK, new_figure, save_figure
from .lineage import Individual, Lineage


__all__ = ["draw_lineage"]


def draw_lineage(
    lineage: Lineage,
    winner: int,
    path: str | os.PathLike[str],
    *,
    ylabel: str = "fitness of newborns",
    facts: Sequence[str] = (),
) -> None:
    """Draw a dot a newborn, a thin line to its parent, and a thick one from the winner back to its first ancestor.

    Args:
        winner: id of the individual whose ancestors are shown.
        path: of the picture; its ending says the format.
        facts: which of `Individual.facts` to write beside the winner and its ancestors.
    """
    lived = {one.id: (one.generation, one.fitness) for one in lineage if one.fitness is not None}
    if winner not in lived:
        raise ValueError(f"winner={winner} has no fitness: it has not lived.")
    generations = 1 + max(generation for generation, _ in lived.values())
    figure = new_figure(max(5.5, 0.55 * generations), 3.6, layout="constrained")
    axes = figure.subplots()
    for one in lineage:
        if one.parent in lived and one.id in lived:
            axes.plot(*zip(lived[one.parent], lived[one.id], strict=True), color=FAINT, linewidth=0.7, zorder=1)
    axes.scatter(*zip(*lived.values(), strict=True), s=13, color="#AAAAAA", zorder=2, label="newborns")
    line = [one for one in (winner, *lineage.ancestors(winner)) if one in lived]
    x, y = zip(*(lived[one] for one in line), strict=True)
    axes.plot(x, y, color=COLORS[0], linewidth=2, marker="o", markersize=5, zorder=3, label="ancestors of the winner")
    for place, id in enumerate(line):
        axes.annotate(
            _label(lineage[id], facts),
            lived[id],
            xytext=(0, 7 if place % 2 == 0 else -7),  # neighbours on different sides, so that they do not overlap
            textcoords="offset points",
            ha="center",
            va="bottom" if place % 2 == 0 else "top",
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )
    axes.set_xlabel("generation", fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=10, color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.06, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=INK, labelsize=9)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path, dpi=150)


def _label(one: Individual, facts: Sequence[str]) -> str:
    return "\n".join([f"#{one.id}", *(str(one.facts[name]) for name in facts if name in one.facts)])
