# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""GTL: a learngene that evolves. Networks inherit a circuit of channels, learn, and pass on what helps others learn.

    accelerate launch examples/train_gtl.py                  # letters, a small VGG11: minutes on two cores
    accelerate launch examples/train_gtl.py --preset gpu     # VGG11 at its width, more and longer lives: hours
    accelerate launch examples/train_gtl.py --preset paper --dataset_name uoft-cs/cifar100 --image_column img \\
        --label_column fine_label                            # the size of a paper; days

1. images    letters rendered on the spot, or any image classification set; base, critic and novel classes
2. evolve    lives on base classes, critics on critic classes, tournaments; a snapshot after every generation
3. compare   on novel classes: the winner's descendant, scratch, and what a trained network has to give
4. publish   the winner as a folder that `Circuit.from_pretrained` reads, fitness and lineage as pictures
"""

import argparse

from arguments import add_data, add_run, create_parser, parse, positive, rate


PRESETS = {
    "smoke": {
        "architecture": "vgg11-smoke",
        "num_generations": 10,
        "population_size": 16,
        "pool_size": 6,
        "life_steps": 60,
        "critic_steps": 20,
        "critic_tasks": 2,
        "networks_per_batch": 8,
        "resolution": 16,
        "test_tasks": 5,
        "test_steps": 200,
    },
    "gpu": {
        "architecture": "vgg11",
        "num_generations": 40,
        "population_size": 32,
        "pool_size": 16,
        "life_steps": 400,
        "critic_steps": 100,
        "critic_tasks": 2,
        "networks_per_batch": 32,
        "resolution": 32,
        "test_tasks": 10,
        "test_steps": 1000,
    },
    "paper": {
        "architecture": "vgg11",
        "num_generations": 100,
        "population_size": 96,
        "pool_size": 48,
        "life_steps": 1200,
        "critic_steps": 200,
        "critic_tasks": 3,
        "networks_per_batch": 32,
        "resolution": 32,
        "test_tasks": 20,
        "test_steps": 2000,
    },
}


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise ValueError  # which argparse reports as "invalid share value"
    return value


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__, "outputs/gtl")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="smoke", help="of everything whose default is not shown")
    data = add_data(parser, "letters").add_argument
    data("--images_per_class", type=positive, default=60, help="of the letters")
    for side, use in (("base", "lives"), ("critic", "critics"), ("novel", "the comparison")):
        data(f"--{side}_classes", nargs="+", help=f"names or numbers, for {use}; default: {use} get their share")
    evolve = parser.add_argument_group("evolution").add_argument
    evolve("--architecture", help="vgg11, resnet12, resnet12-narrow, vgg11-smoke, resnet12-smoke")
    evolve("--budget", type=share, default=0.2, help="share of the parameters that is inherited")
    evolve("--num_generations", type=positive, help="after the first, which inherits nothing")
    evolve("--population_size", type=positive)
    evolve("--tournament_size", type=positive, default=2)
    evolve("--pool_size", type=positive, help="circuits that are kept")
    evolve("--networks_per_batch", type=positive, help="that are trained as one; each process gets whole batches")
    evolve("--mutation_probability", type=share, default=0.1, help="of each set of channels")
    evolve("--mutation_rate", type=share, default=0.1, help="share of a set that is swapped")
    lives = parser.add_argument_group("lives and critics").add_argument
    lives("--num_ways", type=positive, default=5, help="classes of a task")
    lives("--num_shots", type=positive, default=10, help="images of a class that critics and the comparison learn")
    lives("--validation_shots", type=positive, default=20, help="images of a class that they are validated on")
    lives("--life_steps", type=positive)
    lives("--critic_steps", type=positive)
    lives("--critic_tasks", type=positive, help="their mean accuracy is the fitness")
    lives("--train_batch_size", type=positive, default=20)
    lives("--learning_rate", type=rate, default=0.05, help="of SGD, with a cosine to zero")
    ablate = parser.add_argument_group("ablations").add_argument
    ablate("--no_mutation", action="store_true")
    ablate("--selection", choices=["tournament", "random"], default="tournament")
    ablate("--inherit", choices=["weights", "structure"], default="weights", help="structure: no weights (Darwinian)")
    ablate("--fill", choices=["zero", "random"], default="zero", help="of what a circuit would read of other channels")
    test = parser.add_argument_group("comparison on novel classes").add_argument
    test("--test_tasks", type=positive)
    test("--test_ways", type=positive, default=5)
    test("--test_steps", type=positive)
    test("--eval_steps", type=int, nargs="+", default=[0, 5, 20, 100])
    add_run(parser.add_argument_group("run"))
    args = parse(parser, input_args)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(args: argparse.Namespace) -> dict:
    from diffusers_learngene.evolution.gtl import steps
    from diffusers_learngene.runs.run import start_run

    accelerator = start_run("train_gtl", args, mixed_precision="no")

    # 1. Images, and the classes that are for lives, for critics and for the comparison.
    images, classes = steps.load_class_images(args, accelerator)
    tasks = steps.draw_comparison(images, classes, args)

    # 2. Generations. What a generation is: evolution/gtl/evolution.py, `live_generation`.
    evolution = steps.start_evolution(accelerator, images, classes, args)
    evolution.run(
        f"{args.output_dir}/checkpoints",
        resume_from_checkpoint=args.resume_from_checkpoint,
        total_limit=args.checkpoints_total_limit,
    )

    # 3. The winner's descendants beside others.
    found = steps.compare_starts(evolution, tasks, args)

    # 4. Table, pictures, and the artefact.
    results = steps.report(evolution, found, args)
    steps.publish(evolution, results, args)
    return results


if __name__ == "__main__":
    main(parse_args())
