# SPDX-License-Identifier: Apache-2.0
"""Run by two processes (`test_distributed.py`): DDP and FSDP2 against the same step in one process, on CPU."""

import itertools
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffusers_learngene import FINEConfig, KINDConfig, WAVEConfig, class_gate
from diffusers_learngene.anatomy.blocks import find_stacks
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from diffusers_learngene.tuners.base_model import shared_groups
from diffusers_learngene.tuners.kind import KINDLayer
from models import MODELS, Tiny, output_of


WORLD = 2


METHODS = {"wave": WAVEConfig, "fine": FINEConfig, "kind": partial(KINDConfig, num_classes=10)}
# What the samples are, where the model is told by hand.
CLASSES = [4, 2]


def adapted(name: str, method: str, mode: str) -> Tiny:
    tiny = MODELS[name]()
    torch.manual_seed(0)
    tiny.model = get_peft_model(tiny.model, METHODS[method](mode=mode, init_weights=False))
    return tiny


def step(model: nn.Module, inputs: dict[str, Tensor], classes: list[int]) -> Tensor:
    """KIND in a DiT is told by the model's own labels; the step ends in a backward pass that recomputes, or not."""
    labelled = "class_labels" in inputs or not isinstance(next(tuners(model), None), KINDLayer)
    with nullcontext() if labelled else class_gate(model, classes):
        output = output_of(model(**inputs))
    output.square().mean().backward()
    return output.detach()


def tuners(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, LearngeneLayer))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: the banks are units of their own, for blocks other than the owner's call them too."""
    for group in shared_groups(model).values():
        fully_shard(group.bank)
    for stack in find_stacks(model).values():
        for block in stack.children():
            if hasattr(block, "norm1"):  # DiT's own forward calls the embedder of its first block
                fully_shard(block.norm1.emb)
            fully_shard(block)
    return fully_shard(model)


def check(name: str, method: str, mode: str, kind: str, rank: int) -> None:
    reference, tiny = adapted(name, method, mode), adapted(name, method, mode)
    expected = step(reference.model, reference.inputs, CLASSES).chunk(WORLD)[rank]
    inputs = {key: value.chunk(WORLD)[rank] for key, value in tiny.inputs.items()}
    if kind == "checkpointed":
        tiny.model.base_model.model.enable_gradient_checkpointing()
        tiny.model.train()
        for block in tiny.model.base_model.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0
    model = shard(tiny.model) if kind == "fsdp2" else DistributedDataParallel(tiny.model)
    for _ in range(2):
        model.zero_grad()
        torch.testing.assert_close(step(model, inputs, CLASSES[rank : rank + 1]), expected, rtol=1e-4, atol=1e-5)
    wanted, found = gradients(reference.model), gradients(model)
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def check_all() -> dict[str, str]:
    """By the name of every check, "ok" or what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    outcomes = {}
    for kind in ("ddp", "checkpointed", "fsdp2"):
        for name in ("dit",) if kind == "checkpointed" else ("mlp", "dit"):
            for method, mode in itertools.product(METHODS, ("add", "generate")):
                try:
                    check(name, method, mode, kind, dist.get_rank())
                    outcome = "ok"
                except Exception:
                    outcome = traceback.format_exc()
                outcomes[f"{kind}-{name}-{method}-{mode}"] = outcome
                dist.barrier()
    dist.destroy_process_group()
    return outcomes
