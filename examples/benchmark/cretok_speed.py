# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""What an update of CreTok costs, against the paper's loop: batch 1, 16 pairs accumulated. (No weights, no downloads.)

    python examples/benchmark/cretok_speed.py                          # CLIP-L's text encoder: minutes on one core
    python examples/benchmark/cretok_speed.py --layers 2 --width 128   # seconds

naive       for each pair: encode the adaptive prompt and both restrictive ones, padded to 77 as pipelines do; backward
cached      the same, but the restrictive prompts were encoded once, before the training
ours        one forward and backward for all pairs, of a prompt that is not padded (`training.cretok`)

The encoder has random weights of the real size; all sides start from the same row, take turns in one process, and have
to end at the same row.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_learngene.data.pairs import Pair, read_pairs
from diffusers_learngene.data.toy_world import ToyWorld, train_clip_tokenizer
from diffusers_learngene.pipelines.encoders import ClipEncoder, put_row_
from diffusers_learngene.pipelines.prompts import TOKEN, adaptive_prompt, restrictive_prompts
from diffusers_learngene.runs.report import format_table, provenance, write_json
from diffusers_learngene.training.cretok import TokenRows, blend_loss, cosines, embed, encode_pairs, random_rows


PAIRS = Path(__file__).parents[1] / "data" / "cangjie_style.json"
THETA = {"text_encoder": 0.99}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the encoder; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=16, help="an update")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default="outputs/cretok_speed")
    return parser.parse_args(input_args)


def create_encoder(tokenizer: object, width: int, layers: int, seed: int) -> ClipEncoder:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=49408,  # as published; the tokenizer's are among them
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ClipEncoder(tokenizer, CLIPTextModelWithProjection(config).eval().requires_grad_(False))


def naive_update(encoder: ClipEncoder, row: Tensor, pairs: list[Pair], targets: Tensor | None) -> Tensor:
    """The gradient of the token's row, pair by pair; with targets (pairs, 2, d), these are not encoded."""
    table = encoder.table

    def ids(text: str) -> Tensor:
        return encoder.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids

    prompt = ids(adaptive_prompt())
    place = (prompt == encoder.tokenizer.convert_tokens_to_ids(TOKEN))[0]
    gradient = torch.zeros_like(row)
    for index, pair in enumerate(pairs):
        leaf = row.clone().requires_grad_(True)
        hook = table.register_forward_hook(lambda _, __, out: torch.where(place[:, None], leaf, out))  # noqa: B023
        adaptive = embed(encoder, prompt, "pooled")
        hook.remove()
        losses = []
        for order, text in enumerate(restrictive_prompts(*pair)):
            if targets is None:
                with torch.no_grad():
                    target = embed(encoder, ids(text), "pooled")
            else:
                target = targets[index, order][None]
            losses.append(1 - F.cosine_similarity(adaptive, target).clamp(max=THETA["text_encoder"]))
        torch.cat(losses).mean().div(len(pairs)).backward()
        gradient += leaf.grad
    return gradient


def main(args: argparse.Namespace) -> list[dict]:
    pairs = read_pairs(PAIRS)
    encoder = create_encoder(train_clip_tokenizer(ToyWorld(pairs).captions()), args.width, args.layers, args.seed)
    encoders, chosen = {"text_encoder": encoder}, pairs.train[: args.pairs]
    row = random_rows(encoders, seed=args.seed)["text_encoder"]
    begin = time.perf_counter()
    targets = encode_pairs(encoders, chosen, "pooled")
    encoding = time.perf_counter() - begin
    put_row_(encoder, TOKEN, row)

    def ours() -> Tensor:
        token = TokenRows(encoders, {"text_encoder": row})
        blend_loss(cosines(token(), targets), THETA).backward()
        return token.rows["text_encoder"].grad

    sides: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "cached": lambda: naive_update(encoder, row, chosen, targets["text_encoder"]),
        "naive": lambda: naive_update(encoder, row, chosen, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gradients: dict[str, Tensor] = {}
    ours()  # not counted
    for _ in range(args.rounds):
        for name, update in sides.items():
            begin = time.perf_counter()
            gradients[name] = update()
            seconds[name].append(time.perf_counter() - begin)
    scale = gradients["naive"].abs().max()
    rows = [
        {
            "update": name,
            "seconds": statistics.median(seconds[name]),
            "naive / this": statistics.median(n / s for n, s in zip(seconds["naive"], seconds[name], strict=True)),
            "error of the gradient": f"{((gradients[name] - gradients['naive']).abs().max() / scale).item():.1e}",
        }
        for name in sides
    ]
    print(format_table(rows, list(rows[0])))
    print(f"(encoding the {2 * len(chosen)} restrictive prompts, once: {encoding:.2f} s)")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"width": args.width, "layers": args.layers, "pairs": args.pairs, "threads": torch.get_num_threads()}
    write_json(args.output_dir / "cretok_speed.json", {**provenance(), **facts, "seconds": seconds, "rows": rows})
    return rows


if __name__ == "__main__":
    main(parse_args())
