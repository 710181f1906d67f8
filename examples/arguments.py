# SPDX-License-Identifier: Apache-2.0
"""The arguments that the scripts share, in diffusers' words; nothing heavy is imported for --help."""

import argparse
import os


# Threads that wait for each other are to sleep: those that spin are 10 to 80 times slower when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError  # which argparse reports as "invalid positive value"
    return value


def layers(text: str) -> int:
    if (value := int(text)) < 2:  # else nothing recurs that layers could share
        raise ValueError
    return value


def seed(text: str) -> int:
    if (value := int(text)) < 0:  # which no generator takes
        raise ValueError
    return value


def rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError
    return value


def size(text: str) -> tuple[int, int | None]:
    depth, by, heads = text.partition("x")
    return layers(depth), positive(heads) if by else None


def create_parser(description: str | None, output_dir: str) -> argparse.ArgumentParser:
    """A parser with what every script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--seed", type=seed, default=0)
    hub = parser.add_argument_group("Hub").add_argument
    hub("--push_to_hub", action="store_true")
    hub("--hub_model_id")
    hub("--hub_token")
    hub("--license", help="for the model card; without one, none is claimed")
    return parser


def add_data(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    """The group of arguments of the images, and what they are by default."""
    group = parser.add_argument_group(f"data (default: {default})")
    add = group.add_argument
    add("--dataset_name", help="image classification set on the Hub, or a local copy of one")
    add("--dataset_config_name")
    add("--train_data_dir", help="a folder with one folder of images per class")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--resolution", type=positive)
    add("--center_crop", action=argparse.BooleanOptionalAction, default=True)
    add("--broken_images", choices=["error", "skip"], default="error")
    return group


def add_run(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What is kept of a run, how it goes on, and who is told."""
    add = group.add_argument
    add("--checkpoints_total_limit", type=positive, default=1)
    add("--resume_from_checkpoint", choices=["latest"], help="go on where the run in --output_dir stopped")
    add("--report_to", nargs="*", default=[], help="trackers beside log.jsonl: tensorboard, wandb, trackio, ...")


def create_training_parser(description: str | None, output_dir: str, *, tasks: bool = True) -> argparse.ArgumentParser:
    """A parser of a script that trains models on images: data, how to train and to sample.

    Args:
        tasks: whether there are several.
    """
    parser = create_parser(description, output_dir)
    add = parser.add_argument
    if tasks:
        add("--task", choices=["diffusion", "classification"], default="diffusion")
    add("--preset", choices=["demo", "long"], default="demo", help="long: four times the steps")
    data = add_data(parser, "scikit-learn's digits").add_argument
    data("--random_flip", action="store_true")
    data("--dataloader_num_workers", type=int, default=0)
    sample = parser.add_argument_group("samples").add_argument
    sample("--num_samples", type=positive, default=200, help="for the Frechet distance")
    sample("--num_inference_steps", type=positive, default=10)
    sample("--guidance_scale", type=float, default=1.5)
    training = parser.add_argument_group("training")
    train = training.add_argument
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
    add_run(training)
    return parser


def add_model(parser: argparse.ArgumentParser, title: str, *, num_layers: int) -> argparse._ArgumentGroup:
    """The group of arguments of the model that comes first: one that is loaded, or the size of a new one."""
    group = parser.add_argument_group(title)
    add = group.add_argument
    add("--pretrained_model_name_or_path", help="a DiTPipeline, or a model, folder or Hub id; default: train one")
    add("--revision")
    add("--variant")
    add("--label_map", help='JSON file of {"class": label of the model, ...}, where names do not say it')
    add("--num_layers", type=layers, default=num_layers, help="of a model that is trained here")
    add("--num_attention_heads", type=positive, default=4)
    add("--attention_head_dim", type=positive, default=32)
    add("--patch_size", type=positive, default=2)
    return group


def create_condensing_parser(
    description: str | None, output_dir: str, *, elastic_heads: str
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """A parser of a script that condenses for all sizes, and its group "learngene" for what is the method's own."""
    parser = create_training_parser(description, output_dir)
    model = add_model(parser, "ancestry", num_layers=6).add_argument
    model("--ancestry_train_steps", type=positive)
    model("--ancestry_learning_rate", type=rate, default=2e-3)
    compare = parser.add_argument_group("descendants").add_argument
    compare("--descend_sizes", type=size, nargs="+", help="depth or depth x heads: 4 12 16 8x2")
    compare("--descend_train_steps", type=positive, default=200)
    compare("--scaler_train_steps", type=int, default=50, help="of them, on the scalers alone")
    compare("--descend_scaler_learning_rate", type=float, default=1e-3)
    compare("--finetune_learning_rate", type=rate, default=3e-4, help="of whatever starts from trained weights")
    group = parser.add_argument_group("learngene")
    add = group.add_argument
    add(
        "--elastic_depths",
        type=layers,
        nargs="*",
        help="depths drawn while condensing; default: 1/2 to 3/2 the ancestry's",
    )
    add("--elastic_heads", type=positive, nargs="*", help=f"widths drawn too, in heads; default: {elastic_heads}")
    add("--fixed_size", action="store_true", help="condense at the ancestry's size only, as the papers do")
    add("--max_train_steps", type=positive, help="steps of the distillation")
    add("--learning_rate", type=rate, default=1e-3, help="of the bank, which all layers share")
    add("--scaler_learning_rate", type=rate, default=5e-3)
    add("--noise_weight", type=float, default=1.0, help="of the denoising loss beside the distillation")
    add("--alpha", type=float, default=0.5, help="classification: weight of the KL; 1 - alpha: of CE")
    add("--tau", type=rate, default=1.0, help="classification: temperature of the KL")
    return parser, group


def parse(parser: argparse.ArgumentParser, input_args: list[str] | None) -> argparse.Namespace:
    """Parse, and check what all scripts have and argparse does not check."""
    args = parser.parse_args(input_args)
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id.")
    if getattr(args, "label_map", None) and not args.pretrained_model_name_or_path:
        parser.error("--label_map is of the labels of a --pretrained_model_name_or_path.")
    if args.hub_token and "wandb" in args.report_to:
        parser.error("--hub_token with --report_to wandb would show your token to wandb: run `hf auth login` instead.")
    return args


def parse_condensing(
    parser: argparse.ArgumentParser, input_args: list[str] | None, *, max_train_steps: int
) -> argparse.Namespace:
    """`parse` for a script that condenses; steps that were not given are filled in: `max_train_steps`, in the demo."""
    args = parse(parser, input_args)
    long = 4 if args.preset == "long" else 1
    args.ancestry_train_steps = args.ancestry_train_steps or 800 * long
    args.max_train_steps = args.max_train_steps or max_train_steps * long
    if not 0 <= args.scaler_train_steps <= args.descend_train_steps:
        parser.error(f"--scaler_train_steps {args.scaler_train_steps}: 0 to --descend_train_steps, please.")
    if args.fixed_size and (args.elastic_depths or args.elastic_heads):
        parser.error("--fixed_size takes no --elastic_depths or --elastic_heads.")
    return args
