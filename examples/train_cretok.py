# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""CreTok: one token, trained once and without images, that makes a text-to-image pipeline blend any concepts.

    accelerate launch examples/train_cretok.py          # no weights needed: a small CLIP is trained on the spot
    accelerate launch examples/train_cretok.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium

1. encoders   load the CLIP text encoders of a pipeline, and nothing else of it; or train a CLIP on a toy world
2. targets    encode "a lettuce mantis", "a mantis lettuce", ... once
3. train      the token's rows in "a photo of a <CreTok> mixture", until that prompt is near to all of them
4. measure    on pairs and on concepts that were never trained with, beside the word "creative", a random token and (on
              the toy world) a token trained on one pair
"""

import argparse
from pathlib import Path

from arguments import add_run, create_parser, parse, positive, rate


PAIRS = Path(__file__).with_name("data") / "cangjie_style.json"


def cosine(text: str) -> float:
    if not -1 < (value := float(text)) < 1:
        raise ValueError  # which argparse reports as "invalid cosine value"
    return value


def pair(text: str) -> tuple[str, str]:
    first, second = (word.strip() for word in text.split(","))
    if not first or not second:
        raise ValueError
    return first, second


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__, "outputs/cretok")
    base = parser.add_argument_group("base (default: a CLIP that is trained here, on a toy world)").add_argument
    base("--pretrained_model_name_or_path", help="a Stable Diffusion, SDXL, SD3 or Flux pipeline: folder or Hub id")
    base("--revision")
    base("--variant")
    base("--clip_train_steps", type=positive, default=600, help="of the CLIP that is trained here")
    base("--clip_train_batch_size", type=positive, default=48)
    token = parser.add_argument_group("token").add_argument
    token("--placeholder_token", default="<CreTok>")
    token("--initializer_token", default="creative", help="the word that its rows start from, and that T5 reads")
    token("--template", default="a photo of a {} mixture", help="{}: where the token goes")
    token("--text_embedding", choices=["pooled", "eos", "mean"], default="pooled")
    token("--theta", type=cosine, nargs="+", default=[0.5], help="one for all text encoders, or one for each")
    token("--pairs_file", default=str(PAIRS), help='lines like "lettuce, mantis", or JSON; default: the re-built list')
    training = parser.add_argument_group("training")
    train = training.add_argument
    train("--max_train_steps", type=positive, help="updates; default: 10,000, and 300 on the toy world")
    train("--train_batch_size", type=positive, default=16, help="pairs an update")
    train("--gradient_accumulation_steps", type=positive, default=1)
    train("--learning_rate", type=rate, default=0.01)
    train("--lr_scheduler", choices=["linear", "cosine", "polynomial", "constant"], default="cosine")
    train("--lr_warmup_steps", type=int, default=0)
    train("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the encoders; the rows stay in fp32")
    train("--eval_steps", type=positive, default=20, help="updates between two measurements")
    train("--checkpointing_steps", type=positive, default=1000)
    add_run(training)
    images = parser.add_argument_group("example images, for which the whole pipeline is loaded").add_argument
    images("--validation_pairs", type=pair, nargs="*", help="lettuce,mantis ...; default: three, if there is a GPU")
    images("--num_validation_images", type=positive, default=4, help="for each pair")
    images("--num_inference_steps", type=positive, default=28)
    args = parse(parser, input_args)
    args.max_train_steps = args.max_train_steps or (10_000 if args.pretrained_model_name_or_path else 300)
    if args.validation_pairs and not args.pretrained_model_name_or_path:
        parser.error("--validation_pairs needs --pretrained_model_name_or_path: the toy world has no pipeline.")
    return args


def main(args: argparse.Namespace) -> dict:
    from diffusers_learngene.data.pairs import read_pairs
    from diffusers_learngene.pipelines.token import check_token
    from diffusers_learngene.runs.run import start_training_run
    from diffusers_learngene.training.cretok import random_rows, word_rows
    from diffusers_learngene.training.cretok_steps import Training, load_encoders, theta_of

    check_token(args.placeholder_token)
    pairs = read_pairs(args.pairs_file)
    accelerator = start_training_run("train_cretok", args)

    # 1. and 2. Text encoders, and what they make of the pairs.
    base_class, encoders = load_encoders(accelerator, pairs, args)
    run = Training(accelerator, encoders, pairs, theta_of(encoders, args.theta), args)
    word = word_rows(encoders, args.initializer_token)

    # 3. The token; and one that knows a single pair, to compare with.
    tokens, histories = {f'"{args.initializer_token}"': word, "random": random_rows(encoders, seed=args.seed)}, {}
    tokens["CreTok"], histories["CreTok"] = run.train(word, "cretok")
    if args.pretrained_model_name_or_path is None:
        tokens["one pair"], histories["one pair"] = run.train(word, "one pair", one_pair=True)

    # 4. Numbers, plots, and the artefact.
    results = run.report(tokens, histories)
    run.publish(tokens["CreTok"], base_class, results)
    return results


if __name__ == "__main__":
    main(parse_args())
