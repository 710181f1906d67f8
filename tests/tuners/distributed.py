# SPDX-License-Identifier: Apache-2.0
"""Run by two processes (`test_distributed.py`): DDP and FSDP2 against the same step in one process, on CPU.

    python tests/tuners/distributed.py RANK INIT_FILE

Each check prints "name ok" or "name" and what went wrong.
"""

import itertools
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from diffusers_learngene import FINEConfig, KINDConfig, WAVEConfig, class_gate  # noqa: E402
from diffusers_learngene.anatomy.blocks import find_stacks  # noqa: E402
from diffusers_learngene.tuners.base_layer import LearngeneLayer  # noqa: E402
from diffusers_learngene.tuners.base_model import shared_groups  # noqa: E402
from diffusers_learngene.tuners.kind import KINDLayer  # noqa: E402
from models import MODELS, Tiny, output_of  # noqa: E402


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


def main(rank: int, init_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD)
    for kind in ("ddp", "checkpointed", "fsdp2"):
        for name in ("dit",) if kind == "checkpointed" else ("mlp", "dit"):
            for method, mode in itertools.product(METHODS, ("add", "generate")):
                try:
                    check(name, method, mode, kind, rank)
                    outcome = "ok"
                except Exception:
                    outcome = traceback.format_exc()
                print(f"{kind}-{name}-{method}-{mode} {outcome}", flush=True)
                dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
