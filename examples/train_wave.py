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
from dataclasses import replace
from pathlib import Path


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError  # which argparse reports as "invalid positive value"
    return value


def layers(text: str) -> int:
    if (value := int(text)) < 2:  # else nothing recurs that templates could be shared by
        raise ValueError
    return value


def rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError
    return value


def size(text: str) -> tuple[int, int | None]:
    depth, by, heads = text.partition("x")
    return layers(depth), positive(heads) if by else None


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--task", choices=["diffusion", "classification"], default="diffusion")
    add("--preset", choices=["demo", "long"], default="demo", help="long: four times the steps")
    add("--output_dir", default="outputs/wave")
    add("--seed", type=int, default=0)
    data = parser.add_argument_group("data (default: scikit-learn's digits)").add_argument
    data("--dataset_name", help="image classification set on the Hub, or a local copy of one")
    data("--dataset_config_name")
    data("--train_data_dir", help="a folder with one folder of images per class")
    data("--image_column", default="image")
    data("--label_column", default="label")
    data("--resolution", type=positive)
    data("--center_crop", action=argparse.BooleanOptionalAction, default=True)
    data("--random_flip", action="store_true")
    data("--broken_images", choices=["error", "skip"], default="error")
    data("--dataloader_num_workers", type=int, default=0)
    model = parser.add_argument_group("ancestry").add_argument
    model("--pretrained_model_name_or_path", help="a DiTPipeline, or a model, folder or Hub id; default: train one")
    model("--revision")
    model("--variant")
    model("--num_layers", type=layers, default=6, help="of an ancestry that is trained here")
    model("--num_attention_heads", type=positive, default=4)
    model("--attention_head_dim", type=positive, default=32)
    model("--patch_size", type=positive, default=2)
    model("--ancestry_train_steps", type=positive)
    model("--ancestry_learning_rate", type=rate, default=2e-3)
    wave = parser.add_argument_group("learngene").add_argument
    wave("--template_size", type=positive, help="default: half the width, in whole heads of 64")
    wave("--num_templates", type=positive, help="default: two layers' worth of parameters")
    wave(
        "--elastic_depths",
        type=layers,
        nargs="*",
        help="depths drawn while condensing; default: 1/2 to 3/2 the ancestry's",
    )
    wave("--elastic_heads", type=positive, nargs="*", help="widths drawn while condensing, in heads; default: half")
    wave("--fixed_size", action="store_true", help="condense at the ancestry's size only, as the papers do")
    wave("--max_train_steps", type=positive, help="steps of the distillation")
    wave("--learning_rate", type=rate, default=1e-3, help="of the templates")
    wave("--scaler_learning_rate", type=rate, default=5e-3)
    wave("--noise_weight", type=float, default=1.0, help="of the denoising loss beside the distillation")
    wave("--alpha", type=float, default=0.5, help="classification: weight of the KL; 1 - alpha: of CE")
    wave("--tau", type=rate, default=1.0, help="classification: temperature of the KL")
    compare = parser.add_argument_group("descendants").add_argument
    compare("--descend_sizes", type=size, nargs="+", help="depth or depth x heads: 4 12 16 8x2")
    compare("--descend_train_steps", type=positive, default=200)
    compare("--scaler_train_steps", type=int, default=50, help="of them, on the scalers alone")
    compare("--descend_scaler_learning_rate", type=float, default=1e-3)
    compare("--finetune_learning_rate", type=rate, default=3e-4, help="of whatever starts from trained weights")
    compare("--num_samples", type=positive, default=200, help="for the Frechet distance")
    compare("--num_inference_steps", type=positive, default=20)
    compare("--guidance_scale", type=float, default=1.5)
    train = parser.add_argument_group("training").add_argument
    train("--train_batch_size", type=positive, default=32)
    train("--gradient_accumulation_steps", type=positive, default=1)
    train("--gradient_checkpointing", action="store_true")
    train("--mixed_precision", choices=["no", "fp16", "bf16"])
    train(
        "--lr_scheduler",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        default="cosine",
    )
    train("--lr_warmup_steps", type=int, default=30)
    train("--max_grad_norm", type=rate, default=1.0)
    train("--use_ema", action="store_true")
    train("--ema_decay", type=float, default=0.999)
    train("--checkpointing_steps", type=positive, default=500)
    train("--checkpoints_total_limit", type=positive, default=1)
    train("--resume_from_checkpoint", choices=["latest"], help="go on where the run in --output_dir stopped")
    train("--report_to", nargs="*", default=[], help="trackers beside log.jsonl: tensorboard, wandb, trackio, ...")
    hub = parser.add_argument_group("Hub").add_argument
    hub("--push_to_hub", action="store_true")
    hub("--hub_model_id")
    hub("--hub_token")
    args = parser.parse_args(input_args)
    long = 4 if args.preset == "long" else 1
    args.ancestry_train_steps = args.ancestry_train_steps or 800 * long
    args.max_train_steps = args.max_train_steps or 1000 * long
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id.")
    if args.hub_token and "wandb" in args.report_to:
        parser.error("--hub_token with --report_to wandb would show your token to wandb: run `hf auth login` instead.")
    if not 0 <= args.scaler_train_steps <= args.descend_train_steps:
        parser.error(f"--scaler_train_steps {args.scaler_train_steps}: 0 to --descend_train_steps, please.")
    if args.fixed_size and (args.elastic_depths or args.elastic_heads):
        parser.error("--fixed_size takes no --elastic_depths or --elastic_heads.")
    return args


def main(args: argparse.Namespace) -> dict:
    from huggingface_hub import create_repo

    from diffusers_learngene import Learngene, WAVEConfig
    from diffusers_learngene.artefact import hub_id
    from diffusers_learngene.models import (
        depth_key,
        enable_gradient_checkpointing_,
        model_config,
        size_overrides,
        width_overrides,
    )
    from diffusers_learngene.training.arguments import load_task, training_options
    from diffusers_learngene.training.comparison import Comparison
    from diffusers_learngene.training.condensing import distil
    from diffusers_learngene.training.loop import train
    from diffusers_learngene.training.tracking import create_accelerator

    output_dir = Path(args.output_dir)
    accelerator = create_accelerator(
        "train_wave",
        output_dir=output_dir,
        config={key: value for key, value in vars(args).items() if key != "hub_token"},
        report_to=args.report_to,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    if args.push_to_hub and accelerator.is_main_process:  # a wrong name or token is found out now
        args.hub_model_id = create_repo(args.hub_model_id, token=args.hub_token, exist_ok=True).repo_id
    task, ancestry = load_task(args, accelerator)
    options = training_options(args)

    # Every size there will be, before anything takes time.
    config = model_config(ancestry)
    depth, heads = config[depth_key(config)], config["num_attention_heads"]
    depths = args.elastic_depths or sorted({max(2, round(depth * factor)) for factor in (0.5, 0.75, 1, 1.25, 1.5)})
    drawn = args.elastic_heads if args.elastic_heads is not None else [heads // 2]
    others = [h for h in dict.fromkeys(drawn) if h not in (0, heads)]
    sizes = [{}] if args.fixed_size else [size_overrides(config, d, h) for h in [heads, *others] for d in depths]
    default_sizes = [(max(2, round(depth * factor)), heads) for factor in (1.5, 0.5, 5 / 6)]
    default_sizes += [(depth, h) for h in others[:1]]
    wanted = dict.fromkeys((d, h or heads) for d, h in args.descend_sizes or default_sizes)  # each once
    targets = [size_overrides(config, d, h) for d, h in wanted]

    def condense() -> Learngene:
        return Learngene.condense(
            ancestry,
            WAVEConfig(mode="generate", template_size=args.template_size, num_templates=args.num_templates),
            widths=[] if args.fixed_size else [width_overrides(config, h) for h in others],
            ancestry=args.pretrained_model_name_or_path,
        )

    learngene = condense()  # also of an ancestry yet to be trained, because what cannot be is an error here
    for overrides in [*sizes, *targets]:
        learngene.layout(learngene.config.override(overrides))

    # 1. The ancestry.
    if args.pretrained_model_name_or_path is None:
        if args.gradient_checkpointing:
            enable_gradient_checkpointing_(ancestry)
        train(
            accelerator,
            ancestry,
            lambda model, batch, generator, step: task.loss(model, batch, generator),
            task.train_data,
            replace(options, max_train_steps=args.ancestry_train_steps, learning_rate=args.ancestry_learning_rate),
            output_dir=str(output_dir / "checkpoints" / "ancestry"),
            name="ancestry",
        )
        if accelerator.is_main_process:
            ancestry.save_pretrained(output_dir / "models" / "ancestry")
        learngene = condense()

    # 2. One learngene for all sizes.
    learngene, _ = distil(
        accelerator,
        learngene,
        ancestry,
        task,
        sizes,
        options,
        output_dir=str(output_dir / "checkpoints" / "condense"),
        scaler_learning_rate=args.scaler_learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if accelerator.is_main_process:
        learngene.save_pretrained(output_dir / "learngene")

    # 3. and 4. Descendants of every size, and what else one could have started from.
    comparison = Comparison(
        accelerator,
        task,
        ancestry,
        learngene,
        replace(options, max_train_steps=args.descend_train_steps),
        output_dir=args.output_dir,
        scaler_steps=args.scaler_train_steps,
        scaler_learning_rate=args.descend_scaler_learning_rate,
        finetune_learning_rate=args.finetune_learning_rate,
        scratch_learning_rate=args.ancestry_learning_rate,
        num_samples=args.num_samples,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    for overrides in targets:
        comparison.run(overrides)
    results = comparison.report()

    # The artefact, with its numbers and pictures in the card.
    own = "own images" if args.dataset_name or args.train_data_dir else "scikit-learn's digits"
    keys = ("task", "max_train_steps", "learning_rate", "scaler_learning_rate", "seed")
    learngene.card = comparison.card(repo_id=args.hub_model_id) | {
        "training": {"data": hub_id(args.dataset_name) or own, **{key: getattr(args, key) for key in keys}}
    }
    if accelerator.is_main_process:
        learngene.save_pretrained(output_dir / "learngene")
        if args.push_to_hub:
            learngene.push_to_hub(args.hub_model_id, token=args.hub_token)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main(parse_args())
