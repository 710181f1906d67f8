# SPDX-License-Identifier: Apache-2.0
"""Pictures of the room: the four terrains from above and from the side, and an agent at work, as a GIF."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...runs.plots import INK, new_figure, save_figure
from .evolution import Heir
from .life import LifeConfig, make_environment
from .network import Network
from .terrains import LENGTH, WIDTH, height_field


__all__ = ["draw_terrains", "film"]


def draw_terrains(terrains: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Of each terrain the map (height as shade) and the profile along its middle, the way that the ant goes."""
    figure = new_figure(9.0, 1.75 * len(terrains), layout="constrained")
    grid = figure.subplots(2 * len(terrains), 1, sharex=True, height_ratios=[2.2, 1] * len(terrains))
    reach = (-LENGTH / 2, LENGTH / 2)
    for index, terrain in enumerate(terrains):
        field = height_field(terrain)
        above, beside = grid[2 * index], grid[2 * index + 1]
        picture = above.imshow(
            field.T, extent=(*reach, -WIDTH / 2, WIDTH / 2), aspect="auto", cmap="cividis", vmin=-0.3, vmax=1.1
        )
        above.set_title(terrain, fontsize=10.5, color=INK, loc="left")
        above.set_ylabel("x (m)", fontsize=9, color=INK)
        middle = field[:, field.shape[1] // 2 - 2]
        beside.fill_between(np.linspace(*reach, len(middle)), -0.5, middle, color="#0072B2", alpha=0.35, linewidth=0)
        beside.plot(np.linspace(*reach, len(middle)), middle, color="#0072B2", linewidth=1)
        beside.set_ylim(-0.5, 1.3)
        beside.set_ylabel("z (m)", fontsize=9, color=INK)
        for axes in (above, beside):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color="#999999", labelcolor=INK, labelsize=8)
    grid[-1].set_xlabel("y (m): the ant starts at -50 and is to reach 57", fontsize=9, color=INK)
    figure.colorbar(picture, ax=list(grid), shrink=0.4, aspect=30, label="height (m)")
    save_figure(figure, path, dpi=130)


def film(
    config: LifeConfig,
    task: str,
    agent: Heir,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    seconds: float = 6.0,
    size: tuple[int, int] = (320, 180),
) -> None:
    """A GIF of an agent that acts without chance (the mean action).

    Raises:
        RuntimeError: this machine cannot draw; see `environment`.
    """
    environment = make_environment(config, task, render_mode="rgb_array", width=size[0], height=size[1])
    rate = environment.metadata["render_fps"]
    every = max(1, round(rate / 10))
    observation, _ = environment.reset(seed=seed)
    network = Network(len(observation), environment.action_space.shape[0], seed=0)
    network.load_(agent.actor)
    frames = []
    for step in range(round(seconds * rate)):
        if step % every == 0:
            frames.append(Image.fromarray(environment.render()).quantize(64))
        action, _ = network.act(agent.statistics.normalise(observation))
        observation, _, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            observation, _ = environment.reset()
    environment.close()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 * every / rate), loop=0)
