# SPDX-License-Identifier: Apache-2.0
"""Ways to teach a class-conditional model new classes, beside each other on the same data for the same steps.

    kind      learngenes frozen; new tailors and new label rows (`Learngene.descend(num_new_classes=)`)
    lora, pissa, oft
              PEFT's own adapters of a plainly pre-trained model, and new label rows
    full      all of that model
    scratch   a new model, on the new classes alone

Adapters have about as many trainable parameters as the tailors: of the ranks that there are, the one that comes
nearest. All see the same batches with the same noise, each at the rate that suits it.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..blocks import default_targets, find_matrices
from ..dit import LabelInit, join_label_rows_, label_table, new_label_rows, train_label_rows_
from ..models import empty_model, model_config, num_labels, with_labels
from .diffusion_task import DiffusionTask
from .loop import TrainingOptions
from .trials import Trials, evaluation_steps


__all__ = ["Adaptation", "Adapter", "add_adapter", "count_flops", "count_parameters", "sigma_groups", "with_classes"]

Adapter = Literal["lora", "pissa", "oft"]


def with_classes(
    model: nn.Module, classes: Sequence[int], num_new_classes: int = 0, label_init: LabelInit = "null"
) -> Any:
    """A copy of a DiT that has the label rows of these classes, then those of new ones, then that of the null class.

    Args:
        label_init: how rows of new classes start (`dit.new_label_rows`).
    """
    architecture, config = type(model).__name__, model_config(model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    suffix = f"{(label_table(model) or '').partition('.norm1.')[2]}.weight"
    for name in state:
        if name.endswith(suffix):
            table = state[name][[*classes, -1]]
            state[name] = new_label_rows(table, num_new_classes, label_init, range(len(classes)))
    copied = empty_model(architecture, with_labels(architecture, config, len(classes) + num_new_classes))
    copied.load_state_dict(state, assign=True)
    return copied


def add_adapter(model: nn.Module, way: Adapter, num_parameters: int, seed: int) -> PeftModel:
    """The model with a PEFT adapter of about so many parameters on every matrix of its blocks.

    Of LoRA and PiSSA, ranks are whole numbers; of OFT, blocks are divisors of all input widths.
    """
    targets = default_targets(model)
    shapes = [m.shape for m in find_matrices(model) if m.name in targets or m.name.endswith(_endings(targets))]
    config: LoraConfig | OFTConfig
    if way == "oft":
        smallest = min(columns for _, columns in shapes)
        sizes = [b for b in range(2, smallest + 1) if all(columns % b == 0 for _, columns in shapes)]
        total = sum(columns for _, columns in shapes)  # of which each block of b has b (b - 1) / 2
        block = min(sizes, key=lambda b: abs(total * (b - 1) / 2 - num_parameters))
        config = OFTConfig(r=0, oft_block_size=block, target_modules=targets)
    else:
        rank = max(1, round(num_parameters / sum(map(sum, shapes))))
        start: Any = "pissa" if way == "pissa" else True
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=start)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[arg-type]


def _endings(targets: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{target}" for target in targets)


def sigma_groups(model: nn.Module, learning_rate: float, sigma_learning_rate: float) -> list[dict[str, Any]]:
    """Parameter groups of what is trainable in a KIND model: sigma, and the rest, with a rate for each.

    Where sigma = 0, as new tailors have it, no factor learns before it does.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "_kind_sigma." not in name], "lr": learning_rate},
        {"params": [p for name, p in named if "_kind_sigma." in name], "lr": sigma_learning_rate},
    ]


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Numbers that a model has, or that are trainable; tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


@torch.no_grad()
def count_flops(model: nn.Module, task: DiffusionTask, label: int) -> int:
    """FLOPs of one forward pass of one image, 2 for a multiplication with an addition, as torch counts them."""
    image = torch.zeros(1, *task.shape, device=task.device)
    ids = torch.tensor([label], device=task.device)
    model.to(task.device).eval()
    with FlopCounterMode(display=False) as counter:
        model(image, timestep=torch.zeros_like(ids), class_labels=ids)
    return counter.get_total_flops()


class Adaptation(Trials):
    """Runs one way to adapt after the other, then reports.

    Args:
        base, novel: the tasks of the base and the novel classes; `novel` knows the labels of both.
        options: of a whole training; the learning rate is replaced for each.
        output_dir, num_samples, gradient_checkpointing: as `Trials` has them.
    """

    first_columns = ("way", "trainable")
    last_columns = ("frechet", "base_val_loss", "parameters", "MFLOPs")

    def __init__(
        self,
        accelerator: Accelerator,
        base: DiffusionTask,
        novel: DiffusionTask,
        options: TrainingOptions,
        *,
        output_dir: str,
        num_samples: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            accelerator,
            novel,
            options,
            output_dir=output_dir,
            eval_steps=evaluation_steps(options.max_train_steps),
            num_samples=num_samples,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.base, self.novel = base, novel

    def pretrain(
        self,
        model: nn.Module,
        name: str,
        steps: int,
        learning_rate: float,
        param_groups: Sequence[dict[str, Any]] | None = None,
    ) -> float:
        """Train a model on the base classes, in place; returns its loss on their validation images."""
        history = self.train(
            model, name, steps, learning_rate, task=self.base, param_groups=param_groups, eval_steps=[steps]
        )
        return history[steps]["val_loss"]

    def run(
        self, way: str, model: nn.Module, learning_rate: float, sigma_learning_rate: float | None = None
    ) -> dict[str, Any]:
        """Adapt a model to the novel classes, in place; returns its row of the table."""
        trainable = count_parameters(model, trainable=True)
        groups = sigma_groups(model, learning_rate, sigma_learning_rate) if sigma_learning_rate else None
        history = self.train(model, f"adapt {way}", self.options.max_train_steps, learning_rate, param_groups=groups)
        row = self.record({"way": way, "trainable": trainable}, history, "novel classes", way)
        row["frechet"] = self.sample(way, model)
        return row

    def plain(self, model: nn.Module) -> nn.Module:
        """What an adapted model is deployed as: a stock model, its adapter merged and its label rows in one table."""
        merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
        return join_label_rows_(merged).eval()

    def measure(self, row: dict[str, Any], model: nn.Module) -> None:
        """Add to a row what a deployed model costs, and how well it still knows the base classes."""
        row |= {
            "parameters": count_parameters(model),
            "MFLOPs": count_flops(model, self.novel, self.novel.labels[0]) / 1e6,
            "base_val_loss": self.base_loss(model),
        }

    def base_loss(self, model: nn.Module) -> float:
        """Loss on the base classes' validation images."""
        return self.base.evaluate(model.to(self.accelerator.device).eval())["val_loss"]

    def start_from(self, model: nn.Module, way: str, num_parameters: int, label_init: LabelInit) -> nn.Module:
        """A plainly pre-trained model made ready to be adapted in a way that is not KIND."""
        classes = num_labels(type(model).__name__, model_config(model)) or 0
        new = len(self.novel.labels)
        wider = with_classes(model, range(classes), new, label_init)
        if way not in get_args(Adapter):
            return wider.requires_grad_(True)
        adapted = add_adapter(wider, way, num_parameters, self.options.seed)  # type: ignore[arg-type]
        train_label_rows_(adapted.get_base_model(), classes, new)
        return adapted
