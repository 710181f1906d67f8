# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""FINE end to end: factors U and V that all layers share, and a sigma per layer, for models of any depth.

    accelerate launch examples/train_fine.py                                # the embedded digits, minutes on two cores
    accelerate launch examples/train_fine.py --no_ancestry --fixed_size     # the paper's own way: no ancestry at all
    accelerate launch examples/train_fine.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 --dataset_name ...

1. ancestry    load a DiT (a DiTPipeline or a transformer), or train one
2. condense    closed form, then distillation in which every step draws the student's depth
3. descend     models of --descend_sizes, good before any training; their sigmas are trained, then all of them
4. compare     with training from scratch and with layer selection from the ancestry: same data, same steps
5. sigma_init  the paper's ablation, at the last of these: how sigma starts, before and after training it alone
"""

import argparse

from arguments import create_condensing_parser, parse_condensing, positive


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser, group = create_condensing_parser(__doc__, "outputs/fine", elastic_heads="none")
    fine = group.add_argument
    fine("--rank", type=positive, help="default: the width")
    fine("--start", choices=["layers", "fit", "random"], help="default: layers; with --fixed_size, fit")
    fine("--fit_init", action="store_true", help="fit what training added to the initial weights of --seed")
    fine("--no_ancestry", action="store_true", help="train U, sigma and V on the data alone, from a random start")
    args = parse_condensing(parser, input_args, max_train_steps=650)
    # Layers that start alike serve all depths alike: .173 at four of them after 1,000 steps, .176 from "fit", which is
    # ahead at the one depth that it fitted (.172).
    args.start = "random" if args.no_ancestry else args.start or ("fit" if args.fixed_size else "layers")
    if args.no_ancestry and (args.pretrained_model_name_or_path or args.fit_init):
        parser.error("--no_ancestry takes no --pretrained_model_name_or_path or --fit_init.")
    if args.fit_init and args.pretrained_model_name_or_path:
        parser.error("--fit_init needs an ancestry that is initialised here, not a --pretrained_model_name_or_path.")
    return args


def main(args: argparse.Namespace) -> dict:
    from diffusers_learngene import FINEConfig, Learngene
    from diffusers_learngene.runs.run import start_training_run
    from diffusers_learngene.training.arguments import load_belongings, load_task, training_options
    from diffusers_learngene.training.condensing import distil
    from diffusers_learngene.training.steps import compare, plan_sizes, publish, train_ancestry

    accelerator = start_training_run("train_fine", args)
    task, ancestry = load_task(args, accelerator)
    belongings = load_belongings(args, task, ancestry)
    sizes = plan_sizes(args, ancestry, other_widths=False)

    def condense() -> Learngene:
        return Learngene.condense(
            ancestry,
            FINEConfig(mode="generate", r=args.rank),
            widths=sizes.widths,
            start=args.start,
            init_seed=args.seed if args.fit_init else None,
            seed=args.seed,
            ancestry=args.pretrained_model_name_or_path,
            companions=belongings,
        )

    # 1. The ancestry.
    learngene = condense()  # also of one yet to be trained, because what cannot be is an error here
    sizes.check(learngene)
    if args.pretrained_model_name_or_path is None and not args.no_ancestry:
        train_ancestry(accelerator, ancestry, task, args, belongings)
        learngene = condense()

    # 2. One learngene for all sizes.
    learngene = distil(
        accelerator,
        learngene,
        None if args.no_ancestry else ancestry,
        task,
        sizes.condensed,
        training_options(args),
        output_dir=args.output_dir,
        scaler_learning_rate=args.scaler_learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
    )

    # 3., 4. and 5. Descendants of every size, and what else one could have started from.
    comparison = compare(accelerator, task, ancestry, learngene, args, trained_ancestry=not args.no_ancestry)
    for overrides in sizes.descendants:
        comparison.run(overrides)
    comparison.ablate_sigma_init(sizes.descendants[-1], args.scaler_learning_rate)
    results = comparison.report()
    publish(accelerator, learngene, comparison, args, "scaler_learning_rate", "task")
    return results


if __name__ == "__main__":
    main(parse_args())
