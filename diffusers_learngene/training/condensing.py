# SPDX-License-Identifier: Apache-2.0
"""Elastic condensing: distil one learngene so that it makes a working model of *every* size at once.

The closed form (`Learngene.condense`) is only a start. From there the papers distil one auxiliary model of the
ancestry's size. We draw the student's depth and width anew at every step: all sizes share the templates, all depths of
a width share scalers, biases and embedders. What comes out needs no training after `descend`, because every size was
trained already (compare slimmable and once-for-all networks, which keep the full dense weights for that).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..anatomy.companions import Companions
from ..anatomy.models import model_config
from ..anatomy.sizes import override_config
from ..learngene import Learngene
from ..learngene.layout import unstack
from ..runs.checkpoints import digest
from ..runs.loop import TrainingOptions, train
from ..runs.sampler import seeded_generator
from .tasks import Task


class ElasticModel(nn.Module):
    """A learngene as a trainable module: `forward(size, ...)` runs its descendant of that size.

    The parameters are the tensors of the learngene; the weights of a size are made from them by the very functions
    that `Learngene.descend` uses, so a descendant computes what was trained here.

    Args:
        learngene: where the tensors start; it is not changed (see `learngene()`).
        sizes: config overrides of every size that can be asked for, by index.

    Raises:
        ValueError: a size whose width the learngene holds no tensors for (give it to `Learngene.condense(widths=)`),
            or a learngene of KIND, which has one size, and classes.
    """

    def __init__(self, learngene: Learngene, sizes: Sequence[dict]) -> None:
        super().__init__()
        if learngene.config.class_tailors is not None:
            raise ValueError(
                "A learngene of KIND has one size: train `descend()`, whose gate reads the labels, and `absorb` it."
            )
        self.origin, self.sizes = learngene, list(sizes)
        self.tensors = nn.ParameterDict(
            {_encode(key): nn.Parameter(t.clone()) for key, t in learngene.tensors.items()}
        )
        self._plans = []
        for overrides in self.sizes:
            architecture = learngene.config.architecture
            config = override_config(architecture, learngene.config.base_config, overrides)
            anatomy = learngene.config.skeleton(config)
            target = learngene.config.layout_of(anatomy)
            if learngene.width_of(target) is None:
                raise ValueError(
                    f"sizes: the learngene holds no tensors for the width of {overrides}: give it in widths=."
                )
            self._plans.append((target, learngene.origin(anatomy), [anatomy.model]))  # listed: not a submodule

    def forward(self, size: int, *args: object, **kwargs: object) -> object:
        target, origin, (skeleton,) = self._plans[size]
        current = self.origin.with_tensors({_decode(key): tensor for key, tensor in self.tensors.items()})
        tensors, bank = current.tensors_at(target)
        for buffer in skeleton.buffers():  # not registered here, so that nothing else moves them
            buffer.data = buffer.data.to(next(self.parameters()).device)
        skeleton.train(self.training)
        return functional_call(skeleton, unstack(tensors, target, bank, origin), args, kwargs)

    def param_groups(self, learning_rate: float, scaler_learning_rate: float) -> list[dict]:
        """AdamW groups: banks and everything dense at one rate, scalers at a higher one, no weight decay.

        A scaler's gradient sums over a whole tile or component, and there are few of them: they can and must move
        faster.
        """
        scalers = [t for key, t in self.tensors.items() if "/scalers/" in key]
        others = [t for key, t in self.tensors.items() if "/scalers/" not in key]
        return [
            {"params": others, "lr": learning_rate, "weight_decay": 0.0},
            {"params": scalers, "lr": scaler_learning_rate, "weight_decay": 0.0},
        ]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass, in every size."""
        for _, _, (skeleton,) in self._plans:
            recomputed = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, skeleton))
            skeleton._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recomputed)

    def learngene(self) -> Learngene:
        """The learngene with its tensors as they are now, and the sizes that it was condensed for."""
        config = self.origin.config
        tensors = {_decode(key): t.detach().float().cpu().clone() for key, t in self.tensors.items()}
        return self.origin.made_of(type(config)(**{**vars(config), "condensed_for": self.sizes}), tensors)


def _contexts(skeleton: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a block's forward and of its recomputation, which comes when `functional_call` has taken the tensors back."""
    tensors = (*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers(remove_duplicate=False))
    return nullcontext(), _holding(skeleton, dict(tensors))


@contextmanager
def _holding(skeleton: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, these are the model's parameters and buffers."""
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(path)
        places.append((module._parameters if attribute in module._parameters else module._buffers, attribute, tensor))
    before = [owner[attribute] for owner, attribute, _ in places]
    for owner, attribute, tensor in places:
        owner[attribute] = tensor
    try:
        yield
    finally:
        for (owner, attribute, _), tensor in zip(places, before, strict=True):
            owner[attribute] = tensor


def _encode(key: str) -> str:
    return key.replace(".", "/")


def _decode(key: str) -> str:
    return key.replace("/", ".")


def draw_size(count: int, seed: int, step: int) -> int:
    """Which of `count` sizes all processes train at a step, each as likely: a pure function of (seed, step)."""
    generator = seeded_generator(seed, step, 1 << 20)  # no shard of the batch has this number
    return int(torch.multinomial(torch.ones(count, dtype=torch.float64), 1, generator=generator))


def distil(
    accelerator: Accelerator,
    learngene: Learngene,
    ancestry: nn.Module | None,
    task: Task,
    sizes: Sequence[dict],
    options: TrainingOptions,
    *,
    output_dir: str,
    scaler_learning_rate: float = 5e-3,
    gradient_checkpointing: bool = False,
) -> Learngene:
    """Train a learngene so that it serves all of `sizes` (one size: the papers' auxiliary model), and save it.

    Args:
        ancestry: to be distilled; None: the task's own loss, as the papers build FINE (its stage 1).
        sizes: config overrides; their widths must be among the learngene's.
        options: `learning_rate` is that of the banks.
        output_dir: checkpoints/condense and learngene/ go here.
        scaler_learning_rate: of the scalers.

    Returns:
        The trained learngene.
    """
    elastic = ElasticModel(learngene, sizes)
    if gradient_checkpointing:
        elastic.enable_gradient_checkpointing()
    if ancestry is not None:
        ancestry.to(accelerator.device).eval()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> Tensor:
        student = partial(model, draw_size(len(sizes), options.seed, step))
        if ancestry is None:
            return task.loss(student, batch, generator)
        return task.distillation_loss(student, ancestry, batch, generator)

    train(
        accelerator,
        elastic,
        loss_fn,
        task.train_data,
        options,
        output_dir=f"{output_dir}/checkpoints/condense",
        name="condense",
        param_groups=elastic.param_groups(options.learning_rate, scaler_learning_rate),
        signature={
            "task": task.distillation_settings if ancestry is not None else task.settings,
            "sizes": list(sizes),
            "ancestry": None if ancestry is None else _describe(ancestry),
            "learngene": asdict(replace(learngene.config, ancestry=None, companions=Companions())),
        },
    )
    learngene = elastic.learngene()
    if accelerator.is_main_process:
        learngene.save_pretrained(f"{output_dir}/learngene")
    return learngene


def _describe(teacher: nn.Module) -> dict[str, Any]:
    return {"weights": digest(teacher.state_dict().items()), "config": model_config(teacher)}
