# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train,rl]"]
# ///
"""What a life of GRL costs beside bare simulation, and beside stable-baselines3's PPO. (No downloads.)

    python examples/benchmark/grl_speed.py               # the ant; two minutes a core

bare     mujoco.mj_step with random actions, nothing else: what no life can exceed
life     `life.live`: policy, environment, and PPO with 10 passes of minibatches of 64
sb3      the same with stable-baselines3: PPO(LearngenePolicy, ...), the same network and settings

One process on each core, all of one side at the same time; the sides take turns.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terrain", default="step")
    parser.add_argument("--steps", type=int, default=4096, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=None)
    parser.add_argument("--output_dir", type=Path, default="outputs/grl_speed")
    return parser.parse_args(input_args)


def bare(terrain: str, steps: int, epochs: int, seed: int) -> float:
    """Seconds."""
    import mujoco
    import numpy as np

    from diffusers_learngene.evolution.grl.environment import LearngeneAntEnv

    environment = LearngeneAntEnv(terrain)
    environment.reset(seed=seed)
    actions = np.random.default_rng(seed).normal(0, 0.6, (steps * epochs, 8))
    model, data = environment.model, environment.data
    begin = time.perf_counter()
    for action in actions:
        data.ctrl[:] = action
        mujoco.mj_step(model, data, nstep=environment.frame_skip)
    return time.perf_counter() - begin


def life(terrain: str, steps: int, epochs: int, seed: int) -> float:
    from diffusers_learngene.evolution.grl.life import LifeConfig, live

    begin = time.perf_counter()
    live(LifeConfig(steps=steps, epochs=epochs), terrain, seed)
    return time.perf_counter() - begin


def sb3(terrain: str, steps: int, epochs: int, seed: int) -> float:
    import torch
    from stable_baselines3 import PPO

    from diffusers_learngene.evolution.grl.life import LifeConfig, make_environment
    from diffusers_learngene.evolution.grl.policy import LearngenePolicy

    torch.set_num_threads(1)
    environment = make_environment(LifeConfig(), terrain)
    settings = {"n_steps": steps, "batch_size": 64, "n_epochs": 10, "ent_coef": 0.01, "clip_range_vf": 0.2}
    model = PPO(LearngenePolicy, environment, **settings, seed=seed, device="cpu")
    begin = time.perf_counter()
    model.learn(steps * epochs)
    return time.perf_counter() - begin


SIDES = {"bare": bare, "life": life, "sb3": sb3}


def main(args: argparse.Namespace) -> list[dict]:
    from diffusers_learngene.runs.report import format_table, provenance, write_json
    from diffusers_learngene.runs.tracking import available_cores

    workers = args.num_workers or available_cores()
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for number in range(args.rounds + 1):
            for name, side in SIDES.items():
                size = (args.steps, args.epochs) if number else (64, 1)  # the first round only imports
                futures = [pool.submit(side, args.terrain, *size, seed) for seed in range(workers)]
                seconds = [future.result() for future in futures]
                if number:
                    speeds[name].append(sum(args.steps * args.epochs / value for value in seconds))
    rows = [
        {
            "side": name,
            "steps/s": statistics.median(values),
            "of bare": statistics.median(v / b for v, b in zip(values, speeds["bare"], strict=True)),
            "life / this": statistics.median(v / b for v, b in zip(speeds["life"], values, strict=True)),
        }
        for name, values in speeds.items()
    ]
    print(format_table(rows, list(rows[0])))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"terrain": args.terrain, "steps": args.steps, "epochs": args.epochs, "workers": workers}
    write_json(args.output_dir / "grl_speed.json", {**provenance(), **facts, "speeds": speeds, "rows": rows})
    return rows


if __name__ == "__main__":
    main(parse_args())
