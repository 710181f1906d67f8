# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""How well a pipeline blends pairs that its CreTok never saw, beside two ways that need no training.

    python examples/benchmark/cretok_quality.py --pretrained_model_name_or_path <base> --cretok <artefact> \\
        --clip_model laion/CLIP-ViT-H-14-laion2B-s32B-b79K --pickscore_model yuvalkirstain/PickScore_v1

creative      the base with the plain word: "a photo of a creative mixture that resembles a lettuce and a mantis"
column swap   as BASS (TP2O) makes candidates: of the embeddings of "a photo of a lettuce" and "a photo of a mantis",
              half of the columns, drawn by the seed, each; the best of many is not picked
CreTok        each artefact of --cretok: several, trained with theta 0.3, 0.5 and 0.7, make the sweep

All methods get the same pairs, seeds and starting noise, and one neutral caption is scored. CLIP: similarity of the
image to "a photo of a {concept}", summed over both concepts (is it all there?) and its difference (is one missing?).
PickScore is a CLIP, too; ImageReward is a BLIP (see image_reward.py for how to convert its weights); VQA: the
probability that a chat model with eyes, of transformers, answers yes to whether the image shows the caption (which
model the paper asked is not known).

Written: quality.json, with means and paired 95 % bootstrap intervals (over pairs) of the differences to "creative",
and quality.png. The scores say something if base and scorers were trained: tiny or random weights prove nothing.
"""

import argparse
import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any


PAIRS = Path(__file__).parents[1] / "data" / "cangjie_style.json"
CREATIVE, SWAP = "creative", "column swap"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="the base: a folder or a Hub id")
    add("--cretok", nargs="+", required=True, help="artefacts: folders or Hub ids")
    add("--clip_model", required=True, help="a CLIPModel with its processor")
    add("--pickscore_model", help="a CLIPModel with its processor, as PickScore is")
    add("--pickscore_processor", help="where its processor is; default: with the model")
    add("--imagereward_model", help="a folder with the weights in model.safetensors")
    add("--imagereward_tokenizer", default="google-bert/bert-base-uncased")
    add("--vqa_model", help="an image-text-to-text model with its processor, which has a chat template")
    add("--pairs_file", default=str(PAIRS), help="of a JSON file, the held-out and unseen pairs; of text, all")
    add("--num_pairs", type=int, help="default: all")
    add("--seeds", type=int, default=4, help="images of each pair and method")
    add("--num_inference_steps", type=int, default=28)
    add("--resolution", type=int, help="default: the pipeline's own")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add("--device", help="default: a GPU, if there is one")
    add("--output_dir", type=Path, default="outputs/cretok_quality")
    return parser.parse_args(input_args)


args = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from image_reward import ImageReward  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel  # noqa: E402

from diffusers_learngene import CreTok, CreTokPipeline  # noqa: E402
from diffusers_learngene.data.pairs import Pair, read_pairs  # noqa: E402
from diffusers_learngene.pipelines.cretok import CreTokFluxPipeline  # noqa: E402
from diffusers_learngene.pipelines.prompts import blend_prompt, with_article  # noqa: E402
from diffusers_learngene.runs.plots import image_grid  # noqa: E402
from diffusers_learngene.runs.report import format_table, provenance, write_json  # noqa: E402


Scorer = Callable[[Any, Pair], dict[str, float]]  # of a Pillow image


def caption(pair: Pair) -> str:
    return blend_prompt(pair, word="creative")


def load_tokens(pipe: CreTokPipeline, names: Sequence[str]) -> dict[str, str]:
    """Load all artefacts, each under a name of its own; what to call the methods, and the tokens of the prompts."""
    methods = {}
    for index, name in enumerate(names):
        cretok = CreTok.from_pretrained(name)
        token = cretok.config.token if len(names) == 1 else f"<CreTok-{'abcdefghij'[index]}>"
        pipe.load_cretok(cretok, token=token)
        theta = cretok.config.training.get("theta")
        theta = "/".join(f"{value:g}" for value in dict.fromkeys(theta)) if isinstance(theta, list) else theta
        label = "CreTok" if len(names) == 1 else f"CreTok, theta {theta or name}"
        methods[label if label not in methods else f"{label} ({index + 1})"] = token
    return methods


def swapped(pipe: CreTokPipeline, pair: Pair, seed: int) -> dict[str, Tensor]:
    """Arguments of a call whose prompt embeddings have half of their columns from each concept."""
    options: dict[str, Any] = {"device": pipe._execution_device, "num_images_per_prompt": 1}
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    if isinstance(pipe, CreTokFluxPipeline):  # guided by what it was distilled to, without a negative prompt
        names = ["prompt_embeds", "pooled_prompt_embeds"]
    else:
        options["do_classifier_free_guidance"] = True
    wanted = inspect.signature(pipe.encode_prompt).parameters
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in wanted}  # None: the same as the first
    encoded = [pipe.encode_prompt(f"a photo of {with_article(concept)}", **options) for concept in pair]
    draws = torch.Generator().manual_seed(seed)
    result = {}
    for name, first, second in zip(names, *encoded, strict=False):
        chosen = torch.randperm(first.shape[-1], generator=draws) < first.shape[-1] // 2
        result[name] = first if name.startswith("negative") else torch.where(chosen.to(first.device), first, second)
    return result


@torch.no_grad()
def clip_similarity(model: CLIPModel, processor: Any, image: Any, texts: list[str]) -> list[float]:
    """Cosines of an image with texts."""
    inputs = processor(text=texts, images=image, return_tensors="pt", padding=True, truncation=True).to(model.device)
    output = model(**inputs)
    return F.cosine_similarity(output.image_embeds, output.text_embeds).tolist()


def clip_scores(model: CLIPModel, processor: Any, image: Any, pair: Pair) -> dict[str, float]:
    texts = [f"a photo of {with_article(concept)}" for concept in pair]
    first, second = clip_similarity(model, processor, image, texts)
    return {"clip_sum": first + second, "clip_imbalance": abs(first - second)}


def pick_score(model: CLIPModel, processor: Any, image: Any, pair: Pair) -> dict[str, float]:
    (cosine,) = clip_similarity(model, processor, image, [caption(pair)])
    return {"pickscore": cosine * model.logit_scale.exp().item()}


@torch.no_grad()
def vqa_score(model: Any, processor: Any, image: Any, pair: Pair) -> dict[str, float]:
    """The probability of yes, of yes and no, as the next word of a conversation."""
    question = f'Does this figure show "{caption(pair)}"? Please answer yes or no.'
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    answer = model(**inputs).logits[0, -1].float().softmax(0)
    yes, no = (answer[_first_tokens(processor.tokenizer, words)].sum() for words in (("yes", "Yes"), ("no", "No")))
    return {"vqa": (yes / (yes + no)).item()}


def _first_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    return sorted({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words})


def image_reward(model: ImageReward, image: Any, pair: Pair) -> dict[str, float]:
    return {"imagereward": model(caption(pair), image)}


def load_scorers(args: argparse.Namespace, device: str) -> list[Scorer]:
    def load(score: Callable[..., dict[str, float]], kind: Any, name: str, processor: str | None = None) -> Scorer:
        model = kind.from_pretrained(name).to(device).eval()
        return partial(score, model, AutoProcessor.from_pretrained(processor or name))

    scorers = [load(clip_scores, CLIPModel, args.clip_model)]
    if args.pickscore_model:
        scorers.append(load(pick_score, CLIPModel, args.pickscore_model, args.pickscore_processor))
    if args.imagereward_model:
        reward = ImageReward(args.imagereward_model, args.imagereward_tokenizer).to(device)
        scorers.append(partial(image_reward, reward))
    if args.vqa_model:
        scorers.append(load(vqa_score, AutoModelForImageTextToText, args.vqa_model))
    return scorers


def compare(rows: list[dict], methods: list[str], scores: list[str], *, draws: int = 2000) -> list[dict]:
    """Means of every method, and its difference to "creative" with a 95 % interval: pairs are drawn again, with all
    their seeds, because images of a pair resemble each other."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    random = np.random.default_rng(0)
    picks = random.integers(len(pairs), size=(draws, len(pairs)))
    summary = []
    for method in methods:
        line: dict[str, Any] = {"method": method}
        own = [row for row in rows if row["method"] == method]
        line["seconds"] = float(np.median([row["seconds"] for row in own]))
        for score in scores:
            of_method, of_word = (
                np.array(
                    [np.mean([row[score] for row in rows if (row["method"], row["pair"]) == (m, p)]) for p in pairs]
                )
                for m in (method, CREATIVE)
            )
            line[score] = float(of_method.mean())
            if method != CREATIVE:
                difference = of_method - of_word
                low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
                line[f"{score} - creative"] = [float(difference.mean()), float(low), float(high)]
        summary.append(line)
    return summary


def main(args: argparse.Namespace) -> dict:
    listed = read_pairs(args.pairs_file)
    pairs = ([*listed.held_out, *listed.unseen] or listed.train)[: args.num_pairs]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    pipe = CreTokPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    tokens = load_tokens(pipe, args.cretok)
    scorers, methods = load_scorers(args, device), [CREATIVE, SWAP, *tokens]
    options: dict[str, Any] = {"num_inference_steps": args.num_inference_steps}
    if args.resolution:
        options |= {"height": args.resolution, "width": args.resolution}

    rows: list[dict] = []
    shown: dict[str, list[Tensor]] = {method: [] for method in methods}
    for pair in tqdm(pairs, desc="pairs"):
        for seed in range(args.seeds):
            for method in methods:
                begin = time.perf_counter()
                if method == SWAP:
                    prompt: dict[str, Any] = swapped(pipe, pair, seed)
                elif method == CREATIVE:
                    prompt = {"prompt": caption(pair)}
                else:
                    prompt = {"prompt": pipe.blend_prompt(pair, token=tokens[method])}
                image = pipe(**prompt, **options, generator=torch.Generator().manual_seed(seed)).images[0]
                row = {
                    "pair": " + ".join(pair),
                    "seed": seed,
                    "method": method,
                    "seconds": time.perf_counter() - begin,
                }
                for scorer in scorers:
                    row |= scorer(image, pair)
                rows.append(row)
                if seed == 0 and len(shown[method]) < 6:
                    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
                    shown[method].append(pixels / 127.5 - 1)

    scores = [key for key in rows[0] if key not in ("pair", "seed", "method", "seconds")]
    summary = compare(rows, methods, scores)
    print(format_table(summary, ["method", "seconds", *scores]))
    print("Trained weights make these numbers mean something; tiny or random ones prove nothing about quality.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    labels = ["\n".join(pair) for pair in pairs[:6]]
    grid = {name: torch.stack(images) for name, images in shown.items()}
    image_grid(grid, args.output_dir / "quality.png", column_labels=labels)
    facts = {"device": device, "dtype": args.dtype, "seeds": args.seeds, "pairs": len(pairs), "scores": scores}
    results = {**provenance(), **facts, "summary": summary, "rows": rows}
    write_json(args.output_dir / "quality.json", results)
    return results


if __name__ == "__main__":
    main(args)
