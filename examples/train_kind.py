# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""KIND end to end: a DiT whose knowledge of each class can be taken out, exchanged, and added to.

    accelerate launch examples/train_kind.py                                # the embedded digits, minutes on two cores
    accelerate launch examples/train_kind.py --seeds 0 1 2                  # means, and how far they spread
    accelerate launch examples/train_kind.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \\
        --dataset_name ... --base_classes tabby beagle ... --novel_classes axolotl ... --class_groups groups.json

1. pre-train   on the base classes: KIND, learngenes for all classes and tailors for each; and the same DiT plainly
2. adapt       to the novel classes, for equal steps: KIND with frozen learngenes and new tailors, against LoRA, PiSSA,
               OFT, full fine-tuning and training from scratch
3. compare     loss on novel and base classes, Frechet distance, parameters, FLOPs
4. look        at samples with the tailors of their class, with none, and with those of another class
5. deploy      the tailors of a few classes in a smaller model; those of one class as a plain, stock DiT
"""

import argparse
from typing import TYPE_CHECKING

from arguments import add_model, create_training_parser, parse, positive, rate, seed


if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_learngene import Learngene
    from diffusers_learngene.training.adaptation import Adaptation

ADAPTED = {"lora": 5e-3, "pissa": 3e-3, "oft": 2e-3, "full": 1e-3}  # ways to adapt the plain DiT, and their rates


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = create_training_parser(__doc__, "outputs/kind", tasks=False)
    parser.add_argument("--seeds", type=seed, nargs="+", help="run for each of these seeds; default: --seed alone")
    classes = parser.add_argument_group("classes, by name or number").add_argument
    classes("--base_classes", nargs="+", help="to pre-train on; default: the first 7 of 10, or all but the novel ones")
    classes("--novel_classes", nargs="+", help="to adapt to; default: all others")
    classes("--class_groups", help="JSON file of base classes that share tailors: {group: [class, ...], ...}")
    classes("--images_per_novel_class", type=positive, help="few shots: train on so many only")
    model = add_model(parser, "model", num_layers=4).add_argument
    model("--num_learngene", type=positive, help="components for all classes; default: 5/8 of the width")
    model(
        "--tailors_per_class", type=positive, help="components of each class (or group); default: a 16th of the width"
    )
    train = parser.add_argument_group("steps and rates").add_argument
    train("--max_train_steps", type=positive, help="of the pre-training")
    train("--learning_rate", type=rate, help="of it; default: 2e-3, or 3e-4 for a loaded model")
    train("--adapt_train_steps", type=positive)
    train("--tailor_learning_rate", type=rate, default=1e-2, help="of new tailors and label rows")
    train("--sigma_learning_rate", type=rate, default=1e-2, help="of the sigma of new tailors")
    train("--label_init", choices=["null", "mean"], default="mean", help="where new label rows start")
    for way, default in ADAPTED.items():
        train(f"--{way}_learning_rate", type=rate, default=default)
    args = parse(parser, input_args)
    long = 4 if args.preset == "long" else 1
    args.max_train_steps = args.max_train_steps or 600 * long
    args.adapt_train_steps = args.adapt_train_steps or 200 * long
    args.learning_rate = args.learning_rate or (3e-4 if args.pretrained_model_name_or_path else 2e-3)
    args.seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    args.seed = args.seeds[0]
    return args


def run(accelerator: "Accelerator", args: argparse.Namespace) -> "tuple[Learngene, Adaptation]":
    """One seed: the learngene of all classes, and the comparison."""
    from diffusers_learngene import KINDConfig, Learngene
    from diffusers_learngene.initializers import scratch
    from diffusers_learngene.training.adaptation import Adaptation
    from diffusers_learngene.training.arguments import load_belongings, load_class_tasks, training_options
    from diffusers_learngene.training.ways import count_parameters, sigma_groups, with_classes

    base, novel, plain, groups = load_class_tasks(args, accelerator)
    belongings = load_belongings(args, base, plain)
    width = plain.config.num_attention_heads * plain.config.attention_head_dim
    learngene = Learngene.condense(
        plain,
        KINDConfig(
            mode="generate",
            num_learngene=args.num_learngene or width * 5 // 8,
            tailors_per_class=args.tailors_per_class or max(1, width // 16),
            class_groups=groups,
        ),
        ancestry=args.pretrained_model_name_or_path,
        companions=belongings,
    )
    trials = Adaptation(
        accelerator,
        base,
        novel,
        training_options(args),
        adapt_train_steps=args.adapt_train_steps,
        output_dir=args.output_dir,
        num_samples=args.num_samples,
        gradient_checkpointing=args.gradient_checkpointing,
        prefix=f"seed {args.seed} " if len(args.seeds) > 1 else "",
        belongings=belongings,
    )

    # 1. KIND and the same DiT, from the same weights, on the base classes.
    kind = learngene.descend()
    if args.pretrained_model_name_or_path:  # what cutting its singular values costs
        trials.note("plain DiT, as loaded", plain, "base_val_loss")
        trials.note("KIND, as cut from it", kind, "base_val_loss")
    trials.pretrain(kind, "KIND")
    trials.pretrain(plain, "plain DiT")
    learngene = learngene.absorb(kind)
    trials.draw_tailors(kind)

    # 2. and 3. The novel classes. The base classes' tailors are put beside the new ones when these are trained.
    new = {"num_new_classes": len(novel.labels), "label_init": args.label_init, "seed": args.seed}
    tailored, complete = learngene.descend(classes=[], **new), learngene.descend(**new)
    budget = count_parameters(tailored, trainable=True)
    rates = sigma_groups(tailored, args.tailor_learning_rate, args.sigma_learning_rate)
    trials.adapt("kind", tailored, args.tailor_learning_rate, rates)
    trained = {name: parameter for name, parameter in tailored.named_parameters() if parameter.requires_grad}
    complete.load_state_dict(trained, strict=False)
    learngene = learngene.absorb(complete)
    learngene.config.companions = trials.belongings.small  # the novel classes have names, too
    for way in ADAPTED:
        trials.adapt_plain(way, plain, getattr(args, f"{way}_learning_rate"), budget, args.label_init)
    anew = with_classes(scratch(plain, {}, seed=args.seed), base.labels, len(novel.labels))
    trials.adapt("scratch", anew, args.learning_rate)

    # 4. and 5. What only KIND can do.
    trials.deploy(learngene)
    return learngene, trials


def main(args: argparse.Namespace) -> dict:
    from diffusers_learngene.runs.run import start_training_run
    from diffusers_learngene.training.adaptation import combine
    from diffusers_learngene.training.steps import publish

    accelerator, several = start_training_run("train_kind", args), len(args.seeds) > 1
    runs = []
    for one_seed in args.seeds:
        folder = f"{args.output_dir}/seed-{one_seed}" if several else args.output_dir
        learngene, trials = run(
            accelerator, argparse.Namespace(**vars(args) | {"seed": one_seed, "output_dir": folder})
        )
        runs.append((learngene, trials))
        if several:
            trials.report()
    trials = combine([trials for _, trials in runs], args.seeds, args.output_dir)
    results = trials.report()
    publish(accelerator, runs[0][0], trials, args, "adapt_train_steps", "tailor_learning_rate", "sigma_learning_rate")
    return results


if __name__ == "__main__":
    main(parse_args())
