# SPDX-License-Identifier: Apache-2.0
"""The steps of the script that trains a CreTok: encoders, training, measuring, publishing."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from ..data.pairs import Pair, PairList
from ..data.toy_world import ToyWorld, create_clip, train_clip_tokenizer
from ..hub.files import hub_id
from ..pipelines.cretok import CreTokPipeline, family_of
from ..pipelines.encoders import ClipEncoder, load_clip_encoders
from ..pipelines.prompts import blend_prompt
from ..pipelines.token import CreTok, CreTokConfig
from ..runs.loop import TrainingOptions, train
from ..runs.plots import curves, histograms, image_grid
from ..runs.report import format_cell, format_table, provenance, write_json
from ..runs.run import end_run, publish_artefact
from .cretok import TokenRows, check_saturation, cosines, encode_pairs, mean_cosine, train_token


__all__ = ["Training", "draw_examples", "load_encoders", "theta_of"]

TRAINED, HELD_OUT, UNSEEN = "training pairs", "unseen pairs", "unseen concepts"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def load_encoders(
    accelerator: Accelerator, pairs: PairList, args: Namespace
) -> tuple[str | None, dict[str, ClipEncoder]]:
    """The text encoders that `args` name and the class of their pipeline; or those of a CLIP that is trained here.

    Raises:
        ValueError: no such pipeline, one that CreTok is not made for, or one without a CLIP text encoder.
    """
    name = args.pretrained_model_name_or_path
    if name is None:
        return None, {"text_encoder": _toy_encoder(accelerator, pairs, args)}
    with accelerator.main_process_first():
        base_class, encoders = load_clip_encoders(
            name,
            revision=args.revision,
            variant=args.variant,
            dtype=_DTYPES.get(accelerator.mixed_precision, torch.float32),
            device=accelerator.device,
        )
    return family_of(base_class).base_class.__name__, encoders


def _toy_encoder(accelerator: Accelerator, pairs: PairList, args: Namespace) -> ClipEncoder:
    """Train a CLIP on a toy world with these concepts; its text encoder, which is saved to models/, with a picture."""
    world = ToyWorld(pairs, seed=args.seed)
    tokenizer = train_clip_tokenizer(world.captions())
    clip = create_clip(tokenizer, seed=args.seed)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> Tensor:
        captions, images = world.draw(len(batch["place"]), generator)
        ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        device = accelerator.device
        return model(input_ids=ids.to(device), pixel_values=images.to(device), return_loss=True).loss

    options = TrainingOptions(
        args.clip_train_steps,
        train_batch_size=args.clip_train_batch_size,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=args.clip_train_steps // 20,
        seed=args.seed,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from_checkpoint=args.resume_from_checkpoint,
    )
    places = [{"place": place} for place in range(args.clip_train_batch_size)]
    folder = Path(args.output_dir)
    checkpoints = f"{folder}/checkpoints/clip"
    train(accelerator, clip, loss_fn, places, options, output_dir=checkpoints, name="clip")  # type: ignore[arg-type]
    state = {key: value for key, value in clip.state_dict().items() if key.startswith(("text_model.", "text_proj"))}
    model = CLIPTextModelWithProjection(clip.config.text_config)
    model.load_state_dict(state)
    model.to(accelerator.device).eval().requires_grad_(False)
    if accelerator.is_main_process:
        model.save_pretrained(folder / "models" / "text_encoder")
        tokenizer.save_pretrained(folder / "models" / "tokenizer")
        image_grid(world.gallery(pairs.train[:6], seed=args.seed), folder / "world.png")
    return ClipEncoder(tokenizer, model)


def theta_of(encoders: Mapping[str, ClipEncoder], theta: Sequence[float]) -> dict[str, float]:
    """By encoder; one number is for all.

    Raises:
        ValueError: several, but not as many as there are encoders.
    """
    if len(theta) not in (1, len(encoders)):
        raise ValueError(f"theta={list(theta)} must be one number, or one for each of {list(encoders)}.")
    return dict(zip(encoders, theta if len(theta) > 1 else list(theta) * len(encoders), strict=True))


class Training:
    """What the tokens of one run share: encoders, targets of all pairs, theta, settings."""

    def __init__(
        self,
        accelerator: Accelerator,
        encoders: dict[str, ClipEncoder],
        pairs: PairList,
        theta: dict[str, float],
        args: Namespace,
    ) -> None:
        self.accelerator, self.encoders, self.pairs, self.theta, self.args = accelerator, encoders, pairs, theta, args
        self.folder = Path(args.output_dir)
        lists = {TRAINED: pairs.train, HELD_OUT: pairs.held_out, UNSEEN: pairs.unseen}
        self.targets = {
            name: encode_pairs(encoders, rows, args.text_embedding, desc=f"encode {name}")
            for name, rows in lists.items()
            if rows
        }

    def rows(self, start: Mapping[str, Tensor]) -> TokenRows:
        """A token with these rows, in the prompt of this run."""
        rows = TokenRows(self.encoders, start, template=self.args.template, kind=self.args.text_embedding)
        return rows.to(self.accelerator.device)

    def measure(self, rows: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By list of pairs and encoder, the cosines (pairs, 2) of a token's prompt with those that name the pairs."""
        with torch.no_grad():
            adaptive = self.rows(rows)()
        return {name: cosines(adaptive, targets) for name, targets in self.targets.items()}

    def train(
        self, start: Mapping[str, Tensor], name: str, *, one_pair: bool = False
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Train a token from these rows, on all training pairs or on the farthest one; its rows, and the history.

        Raises:
            ValueError: most pairs could not pull; see `check_saturation`.
        """
        args, targets = self.args, self.targets[TRAINED]
        begin = self.measure(start)[TRAINED]
        if one_pair:
            far = int(torch.stack([cosine.amax(1) for cosine in begin.values()]).amax(0).argmin())
            targets = {key: target[far : far + 1] for key, target in targets.items()}
        else:
            check_saturation(begin, self.theta)
        options = TrainingOptions(
            args.max_train_steps,
            train_batch_size=args.train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler=args.lr_scheduler,
            lr_warmup_steps=args.lr_warmup_steps,
            max_grad_norm=float("inf"),  # the loss is bounded, and so is what a cosine changes by
            seed=args.seed,
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            resume_from_checkpoint=args.resume_from_checkpoint,
        )
        rows = self.rows(start)
        history = train_token(
            self.accelerator,
            rows,
            targets,
            options,
            theta=self.theta,
            output_dir=f"{self.folder}/checkpoints/{name.replace(' ', '_')}",
            name=name,
            watch=self.targets,
            eval_steps=[*range(0, args.max_train_steps, args.eval_steps), args.max_train_steps],
        )
        return {key: row.detach().cpu() for key, row in rows.rows.items()}, history

    def report(self, tokens: Mapping[str, Mapping[str, Tensor]], histories: Mapping[str, list]) -> dict[str, Any]:
        """Measure all tokens; print the table, draw similarity.png and curves.png, write results.json."""
        found = {token: self.measure(rows) for token, rows in tokens.items()}
        summary = [{"token": token, **_summary(sets)} for token, sets in found.items()]
        values = {
            token: {
                name: {encoder: cosine.flatten().tolist() for encoder, cosine in by_encoder.items()}
                for name, by_encoder in sets.items()
            }
            for token, sets in found.items()
        }
        results = {**provenance(), **_settings(self.args, self.theta), "rows": summary, "cosines": values}
        if not self.accelerator.is_main_process:
            return results
        table = format_table(summary, list(summary[0]))
        print(f"\nMean cosine of the adaptive prompt with the prompts that name a pair\n{table}\n")
        histograms(
            {
                f"{name}, {encoder}" if len(self.encoders) > 1 else name: {
                    token: values[token][name][encoder] for token in values
                }
                for name in self.targets
                for encoder in self.encoders
            },
            self.folder / "similarity.png",
            xlabel="cosine of the adaptive prompt with a prompt that names a pair",
            marks={"theta": sorted(set(self.theta.values()))},
        )
        curves(
            {
                name: {
                    token: [(row["step"], row[name]) for row in history if name in row]
                    for token, history in histories.items()
                }
                for name in self.targets
            },
            self.folder / "curves.png",
            xlabel="updates",
            ylabel="mean cosine",
        )
        write_json(self.folder / "results.json", results)
        return results

    def publish(self, rows: dict[str, Tensor], base_class: str | None, results: dict[str, Any]) -> None:
        """Save the token with its numbers and pictures in the card, and push it if the arguments say so."""
        args, accelerator = self.args, self.accelerator
        config = CreTokConfig(
            encoders={name: len(row) for name, row in rows.items()},
            token=args.placeholder_token,
            plain_word=args.initializer_token,
            template=args.template,
            base_class=base_class,
            base_model=hub_id(args.pretrained_model_name_or_path),
            training=_settings(args, self.theta),
        )
        cretok = CreTok(config, rows)
        if accelerator.is_main_process:
            images = [self.folder / "similarity.png", self.folder / "curves.png"]
            if (chosen := self._validation_pairs()) and base_class is not None:
                images.insert(0, self.folder / "examples.png")
                draw_examples(cretok, chosen, images[0], accelerator.device, args)
            summary = [{key: format_cell(value) for key, value in row.items()} for row in results["rows"]]
            cretok.card = {"images": images, "results": summary, "commit": results["commit"]}
            publish_artefact(cretok, self.folder / "cretok", args)
        end_run(accelerator)

    def _validation_pairs(self) -> list[Pair]:
        if self.args.validation_pairs is not None:
            return self.args.validation_pairs
        return (self.pairs.held_out or self.pairs.train)[:3] if self.accelerator.device.type == "cuda" else []


def _summary(sets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """By list of pairs: the mean cosine and its 10th percentile (p10), over encoders."""
    summary: dict[str, float] = {}
    for name, cosine in sets.items():
        low = [values.flatten().quantile(0.1) for values in cosine.values()]
        summary |= {name: mean_cosine(cosine), f"{name} p10": torch.stack(low).mean().item()}
    return summary


def _settings(args: Namespace, theta: Mapping[str, float]) -> dict[str, Any]:
    """What the training was done with, for the artefact and the results: no path of this machine."""
    names = ("text_embedding", "initializer_token", "max_train_steps", "train_batch_size", "learning_rate")
    settings = {name: getattr(args, name) for name in (*names, "lr_scheduler", "mixed_precision", "seed")}
    return {**settings, "theta": list(theta.values())}


def draw_examples(cretok: CreTok, pairs: Sequence[Pair], path: Path, device: torch.device, args: Namespace) -> None:
    """A picture of what the whole pipeline makes of these pairs with the token: one row for each."""
    dtype = _DTYPES.get(args.mixed_precision or "no", torch.float32)
    pipe = CreTokPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype
    ).to(device)
    pipe.load_cretok(cretok)
    rows = {}
    for pair in pairs:
        prompt = blend_prompt(pair, word=cretok.config.token, template=cretok.config.template)
        seeds = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_validation_images)]
        images = [
            pipe(prompt, num_inference_steps=args.num_inference_steps, generator=seed, output_type="pt").images[0]
            for seed in seeds
        ]
        rows[" + ".join(pair)] = torch.stack(images).float().cpu() * 2 - 1
    image_grid(rows, path)
