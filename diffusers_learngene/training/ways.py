# SPDX-License-Identifier: Apache-2.0
"""What adapting a class-conditional DiT takes: label rows, PEFT's adapters of a wanted size; and what models cost."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..anatomy import Anatomy
from ..anatomy.dit import LabelInit, label_table, new_label_rows
from ..anatomy.models import empty_model, model_config, with_labels
from .diffusion_task import DiffusionTask


__all__ = ["Adapter", "add_adapter", "count_flops", "count_parameters", "sigma_groups", "with_classes"]

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
    anatomy = Anatomy.of(model)
    targets = anatomy.default_targets
    shapes = [m.shape for m in anatomy.matrices if m.name in targets or m.name.endswith(_endings(targets))]
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
def count_flops(model: nn.Module, task: DiffusionTask) -> int:
    """FLOPs of one forward pass of one image, 2 for a multiplication with an addition, as torch counts them."""
    image = torch.zeros(1, *task.shape, device=task.device)
    config: Any = model.config
    null = torch.tensor([config["num_embeds_ada_norm"]], device=task.device)  # a label that all models know
    model.to(task.device).eval()
    with FlopCounterMode(display=False) as counter:
        model(image, timestep=torch.zeros_like(null), class_labels=null)
    return counter.get_total_flops()
