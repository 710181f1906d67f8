# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""WAVE end to end: an ancestry model -> one learngene -> working models of other depths and widths.

    accelerate launch examples/train_wave.py                                # the embedded digits, minutes on two cores
    accelerate launch examples/train_wave.py --task classification          # the same with a ViT
    accelerate launch examples/train_wave.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 --dataset_name ...

1. ancestry    load a DiT (a DiTPipeline or a transformer), or train one
2. condense    closed form, then distillation in which every step draws the student's size
3. descend     models of --descend_sizes, good before any training; their scalers are trained, then all of them
4. compare     with training from scratch and with layer selection from the ancestry: same data, same steps
"""

import argparse

from arguments import create_condensing_parser, parse_condensing, positive


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser, group = create_condensing_parser(__doc__, "outputs/wave", elastic_heads="half the ancestry's")
    wave = group.add_argument
    wave("--template_size", type=positive, help="default: half the width, in whole heads of 64")
    wave("--num_templates", type=positive, help="default: two layers' worth of parameters")
    return parse_condensing(parser, input_args, max_train_steps=1000)


def main(args: argparse.Namespace) -> dict:
    from diffusers_learngene import Learngene, WAVEConfig
    from diffusers_learngene.runs.run import start_training_run
    from diffusers_learngene.training.arguments import load_belongings, load_task, training_options
    from diffusers_learngene.training.condensing import distil
    from diffusers_learngene.training.steps import compare, plan_sizes, publish, train_ancestry

    accelerator = start_training_run("train_wave", args)
    task, ancestry = load_task(args, accelerator)
    belongings = load_belongings(args, task, ancestry)
    sizes = plan_sizes(args, ancestry, other_widths=True)

    def condense() -> Learngene:
        return Learngene.condense(
            ancestry,
            WAVEConfig(mode="generate", template_size=args.template_size, num_templates=args.num_templates),
            widths=sizes.widths,
            ancestry=args.pretrained_model_name_or_path,
            companions=belongings,
        )

    # 1. The ancestry.
    learngene = condense()  # also of one yet to be trained, because what cannot be is an error here
    sizes.check(learngene)
    if args.pretrained_model_name_or_path is None:
        train_ancestry(accelerator, ancestry, task, args, belongings)
        learngene = condense()

    # 2. One learngene for all sizes.
    learngene = distil(
        accelerator,
        learngene,
        ancestry,
        task,
        sizes.condensed,
        training_options(args),
        output_dir=args.output_dir,
        scaler_learning_rate=args.scaler_learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
    )

    # 3. and 4. Descendants of every size, and what else one could have started from.
    comparison = compare(accelerator, task, ancestry, learngene, args)
    for overrides in sizes.descendants:
        comparison.run(overrides)
    results = comparison.report()
    publish(accelerator, learngene, comparison, args, "scaler_learning_rate", "task")
    return results


if __name__ == "__main__":
    main(parse_args())
