# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train,rl]"]
# ///
"""GRL: genes of agents, two layers of a policy network, evolved over generations of reinforcement learning.

    python examples/train_grl.py                        # an arm with four bodies: minutes on two cores
    python examples/train_grl.py --preset laptop        # ants on four terrains, eased
    python examples/train_grl.py --preset paper         # 50 agents x 100 generations, 10^9 steps

1. evolve     each newborn inherits a gene and learns a task by PPO; the fittest pass theirs on. Thrice: what is passed
              on are layers as they were trained (Lamarck), as they were at birth (Darwin), or random ones
2. examine    newborns with the best gene, beside newborns from scratch, with the whole actor, with other layers
3. publish    tables, pictures, and the gene for the Hub

Lives run on all cores; several processes or machines, started by accelerate, share them and get the same evolution.
"""

import argparse
import os

from arguments import positive


for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # a life has one thread, wherever it is lived
    os.environ.setdefault(variable, "1")


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError  # which argparse reports as "invalid count value"
    return value


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=["smoke", "laptop", "paper"], default="smoke")
    add("--output_dir", default="outputs/grl")
    add("--seed", type=int, default=0)
    add("--num_workers", type=positive, help="processes that live; default: one for each core")
    change = parser.add_argument_group("changes of the preset").add_argument
    change("--agents", type=positive, help="newborns a generation")
    change("--generations", type=count, help="after the first, of random agents")
    change("--epochs", type=positive, help="of a life")
    change("--steps", type=positive, help="of an epoch")
    change("--newborns", type=positive, help="of every kind that are examined, on every task")
    change(
        "--inherit_statistics", action="store_true", help="observation statistics are passed on, too; the paper: not"
    )
    change(
        "--heritages",
        nargs="+",
        choices=["trained", "birth", "random"],
        default=["trained", "birth", "random"],
        help="evolutions to run; trained is always among them",
    )
    run = parser.add_argument_group("run").add_argument
    run("--checkpoints_total_limit", type=positive, default=1)
    run("--resume_from_checkpoint", choices=["latest"], help="go on where the run in --output_dir stopped")
    run("--report_to", nargs="*", default=[], help="trackers beside log.jsonl: tensorboard, wandb, trackio, ...")
    hub = parser.add_argument_group("Hub").add_argument
    hub("--push_to_hub", action="store_true")
    hub("--hub_model_id")
    hub("--hub_token")
    args = parser.parse_args(input_args)
    args.heritages = list(dict.fromkeys(["trained", *args.heritages]))
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id.")
    if args.hub_token and "wandb" in args.report_to:
        parser.error("--hub_token with --report_to wandb would show your token to wandb: run `hf auth login` instead.")
    args.mixed_precision, args.gradient_accumulation_steps = None, 1  # lives are numpy's, in fp32
    return args


def main(args: argparse.Namespace) -> dict | None:
    from diffusers_learngene.evolution.grl.evaluation import examine
    from diffusers_learngene.evolution.grl.steps import evolutions, publish, report, settings
    from diffusers_learngene.evolution.grl.workers import Workers, available_cores
    from diffusers_learngene.training.steps import start_run

    preset = settings(args)
    accelerator = start_run("train_grl", args)
    accelerator.print(f"--preset {args.preset} eases: {preset.eased}.")
    with Workers(accelerator, args.num_workers or available_cores()) as workers:
        # 1. Three evolutions, of which the first is the method.
        populations = evolutions(preset, workers, args)
        # 2. What the winner's gene is worth.
        tasks = (*preset.evolution.tasks, *preset.unseen)
        results = examine(populations["trained"], preset.evolution, tasks, preset.newborns, workers)
    # 3. Numbers, pictures, and the artefact.
    found = report(preset, populations, results, args) if accelerator.is_main_process else {}
    publish(accelerator, preset, populations["trained"], found, args)
    return found


if __name__ == "__main__":
    main(parse_args())
