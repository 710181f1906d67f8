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

from arguments import add_run, create_parser, parse, positive


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError  # which argparse reports as "invalid count value"
    return value


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__, "outputs/grl")
    add = parser.add_argument
    add("--preset", choices=["smoke", "laptop", "paper"], default="smoke")
    add("--num_workers", type=positive, help="processes that live; default: one for each core")
    change = parser.add_argument_group("changes of the preset").add_argument
    change("--population_size", type=positive, help="newborns of a generation")
    change("--num_generations", type=count, help="after the first, of random agents")
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
    add_run(parser.add_argument_group("run"))
    args = parse(parser, input_args)
    args.heritages = list(dict.fromkeys(["trained", *args.heritages]))
    return args


def main(args: argparse.Namespace) -> dict | None:
    from diffusers_learngene.evolution.grl.evaluation import examine
    from diffusers_learngene.evolution.grl.steps import evolutions, publish, report, settings
    from diffusers_learngene.evolution.grl.workers import Workers
    from diffusers_learngene.runs.run import start_run
    from diffusers_learngene.runs.tracking import available_cores

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
