# SPDX-License-Identifier: Apache-2.0
"""The steps of a script that condenses: which sizes, an ancestry to start from, publishing what came out."""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..anatomy.belongings import Belongings
from ..anatomy.models import enable_gradient_checkpointing_, model_config
from ..anatomy.sizes import depth_key, size_overrides, width_overrides
from ..hub.files import hub_id
from ..learngene import Learngene
from ..learngene.descendants import save_model
from ..runs.loop import train
from ..runs.run import end_run, publish_artefact
from .arguments import training_options
from .comparison import Comparison
from .tasks import Task, signature_of
from .trials import Trials


__all__ = ["Sizes", "compare", "plan_sizes", "publish", "train_ancestry"]


@dataclass(frozen=True)
class Sizes:
    """Config overrides of every size that a run is about.

    Attributes:
        condensed: drawn while condensing.
        widths: of them, those of another width than the ancestry's, at its depth.
        descendants: that are compared.
    """

    condensed: list[dict]
    widths: list[dict]
    descendants: list[dict]

    def check(self, learngene: Learngene) -> None:
        """Raise a ValueError if a size cannot be made, before anything takes time."""
        for overrides in (*self.condensed, *self.descendants):
            learngene.layout(learngene.config.override(overrides))


def plan_sizes(args: Namespace, ancestry: nn.Module, *, other_widths: bool) -> Sizes:
    """The sizes that `args` name.

    By default: depths from 1/2 to 3/2 of the ancestry's are drawn, and half its width if there are to be
    `other_widths`; descendants are deeper, shallower, and of a depth that is not drawn, at that width if there is one.
    """
    config = model_config(ancestry)
    depth, heads = config[depth_key(config)], config["num_attention_heads"]
    depths = args.elastic_depths or sorted({max(2, round(depth * factor)) for factor in (0.5, 0.75, 1, 1.25, 1.5)})
    drawn = args.elastic_heads if args.elastic_heads is not None else [heads // 2] * other_widths
    others = [h for h in dict.fromkeys(drawn) if h not in (0, heads)]
    default = [(max(2, round(depth * factor)), heads) for factor in (1.5, 0.5)]
    default += [(max(2, round(depth * 5 / 6)), others[0] if others else heads)]
    wanted = dict.fromkeys((d, h or heads) for d, h in args.descend_sizes or default)  # each once
    return Sizes(
        [{}] if args.fixed_size else [size_overrides(config, d, h) for h in [heads, *others] for d in depths],
        [] if args.fixed_size else [width_overrides(config, h) for h in others],
        [size_overrides(config, d, h) for d, h in wanted],
    )


def train_ancestry(
    accelerator: Accelerator, ancestry: Any, task: Task, args: Namespace, belongings: Belongings
) -> None:
    """Train the ancestry in place, and save it to models/ancestry with what belongs to it."""
    if args.gradient_checkpointing:
        enable_gradient_checkpointing_(ancestry)
    train(
        accelerator,
        ancestry,
        lambda model, batch, generator, step: task.loss(model, batch, generator),
        task.train_data,
        replace(
            training_options(args),
            max_train_steps=args.ancestry_train_steps,
            learning_rate=args.ancestry_learning_rate,
        ),
        output_dir=f"{args.output_dir}/checkpoints/ancestry",
        name="ancestry",
        signature=signature_of(task, ancestry),
    )
    if accelerator.is_main_process:
        save_model(ancestry, f"{args.output_dir}/models/ancestry", belongings)


def compare(
    accelerator: Accelerator,
    task: Task,
    ancestry: nn.Module,
    learngene: Learngene,
    args: Namespace,
    *,
    trained_ancestry: bool = True,
) -> Comparison:
    """The comparison of descendants with other starts, as `args` say."""
    return Comparison(
        accelerator,
        task,
        ancestry,
        learngene,
        replace(training_options(args), max_train_steps=args.descend_train_steps),
        output_dir=args.output_dir,
        scaler_steps=args.scaler_train_steps,
        scaler_learning_rate=args.descend_scaler_learning_rate,
        finetune_learning_rate=args.finetune_learning_rate,
        scratch_learning_rate=args.ancestry_learning_rate,
        num_samples=args.num_samples,
        gradient_checkpointing=args.gradient_checkpointing,
        trained_ancestry=trained_ancestry,
    )


def publish(accelerator: Accelerator, learngene: Learngene, trials: Trials, args: Namespace, *more_keys: str) -> None:
    """Save the learngene with its numbers and pictures in the card, and push it if `args` say so.

    Args:
        more_keys: names of arguments that the card is to show, too.
    """
    own = "own images" if args.dataset_name or args.train_data_dir else "scikit-learn's digits"
    keys = ("max_train_steps", "learning_rate", *more_keys, "seed")
    learngene.card = trials.card() | {
        "training": {"data": hub_id(args.dataset_name) or own, **{key: getattr(args, key) for key in keys}}
    }
    if accelerator.is_main_process:
        publish_artefact(learngene, f"{args.output_dir}/learngene", args)
    end_run(accelerator)
