# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene"]
# ///
"""Is a DiT that KIND has cut down to some of its classes faster than the dense one? (No GPU, no data, no downloads.)

    python examples/benchmark/kind_speed.py                  # DiT-L/2, all 24 blocks: some minutes on two cores
    python examples/benchmark/kind_speed.py --layers 4       # the ratio is that of a block, so a few tell it as well

Forward of DiT-L/2 at 256 tokens: dense, against weights in 512 learngenes and 80 tailors of classes that were kept,
with a gate per sample. Both take turns in one process; the ratio is the median over the rounds. Then why it is what it
is: the ratio of FLOPs, which is the bound; the linear layers alone, and what each side makes of its FLOPs in them
(thinner matrices, two calls for one, and the gate between them); and what KIND cannot help, attention and the rest.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("S", "B", "L", "XL"), default="L")
    parser.add_argument("--layers", type=int, help="blocks, two or more (default: as many as the size has)")
    parser.add_argument("--num_learngene", type=int, help="default: half the width")
    parser.add_argument("--tailors", type=int, help="of the kept classes (default: 5 / 64 of the width)")
    parser.add_argument("--classes", type=int, default=4, help="kept classes, which share the tailors out")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output_dir", type=Path, default="outputs/kind_speed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


args = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds

import torch  # noqa: E402
from diffusers import DiTTransformer2DModel  # noqa: E402
from peft import get_peft_model  # noqa: E402
from timing import take_turns  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from diffusers_learngene import KINDConfig, class_gate  # noqa: E402
from diffusers_learngene.anatomy.dit import DIT_SIZES  # noqa: E402
from diffusers_learngene.runs.report import format_table, provenance, write_json  # noqa: E402
from diffusers_learngene.tuners.base_layer import LearngeneLayer  # noqa: E402


COLUMNS = ("what", "dense", "KIND", "unit", "dense / KIND")
SQUARE, FUSED = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"),
)


def models(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The dense model, the cut one, and a batch of the kept classes, with random weights."""
    size = {**DIT_SIZES[args.size], "sample_size": 32}
    size["num_layers"] = args.layers or size["num_layers"]
    width = size["num_attention_heads"] * size["attention_head_dim"]
    torch.manual_seed(args.seed)
    dense = DiTTransformer2DModel(**size).eval()
    tailors = args.tailors or 5 * width // 64
    config = KINDConfig(
        mode="generate",
        num_learngene=args.num_learngene or width // 2,
        tailors_per_class=tailors // args.classes,
        class_groups=[[label] for label in range(args.classes)],
    )
    cut = get_peft_model(DiTTransformer2DModel(**size).eval(), config)
    dtype = getattr(torch, args.dtype)
    for model in (dense, cut):
        nn.Module.to(model, args.device, dtype)
    batch = {
        "hidden_states": torch.randn(args.batch_size, 4, 32, 32, device=args.device, dtype=dtype),
        "timestep": torch.randint(1000, (args.batch_size,), device=args.device),
        "class_labels": torch.arange(args.batch_size, device=args.device) % args.classes,
    }
    return dense, cut, batch


def flops_of(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs by operation, two for a multiply and an add."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no CPU kernel of it
        run()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def linear_calls(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[nn.Module, tuple]]:
    """The layers that KIND adapts, with what the forward pass gives each."""
    calls: list[tuple[nn.Module, tuple]] = []
    names = SQUARE + FUSED
    layers = [m for n, m in model.named_modules() if n.endswith(names) and isinstance(m, nn.Linear | LearngeneLayer)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, given))) for layer in layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return calls


def only_linear(calls: list[tuple[nn.Module, tuple]]) -> None:
    for layer, given in calls:
        layer(*given)


@torch.no_grad()
def main(args: argparse.Namespace) -> list[dict]:
    dense, cut, batch = models(args)
    whole = {"dense": partial(dense, **batch), "KIND": partial(cut, **batch)}
    linear = {name: partial(only_linear, linear_calls(m, batch)) for name, m in (("dense", dense), ("KIND", cut))}
    counted = {name: flops_of(run) for name, run in whole.items()}
    with class_gate(cut, batch["class_labels"]):
        linear_counted = {name: sum(flops_of(run).values()) for name, run in linear.items()}
        linear_seconds = take_turns(linear, args.rounds, args.device)
    seconds = take_turns(whole, args.rounds, args.device)
    rest = {name: [a - b for a, b in zip(seconds[name], linear_seconds[name], strict=True)] for name in seconds}
    total = {name: sum(ops.values()) for name, ops in counted.items()}

    def row(what: str, values: dict[str, float], unit: str, ratio: float = 0.0) -> dict:
        cells = (what, values["dense"], values["KIND"], unit, ratio or values["dense"] / values["KIND"])
        return dict(zip(COLUMNS, cells, strict=True))

    def timing(what: str, values: dict[str, list[float]]) -> dict:
        ratio = statistics.median(a / b for a, b in zip(values["dense"], values["KIND"], strict=True))
        middle = {name: 1e3 * statistics.median(times) for name, times in values.items()}
        return {**row(what, middle, "ms", ratio), "seconds": values}

    speed = {k: linear_counted[k] / statistics.median(linear_seconds[k]) / 1e9 for k in linear_counted}
    rows = [
        timing("forward", seconds),
        row("FLOPs of the forward: the bound", {k: v / 1e9 for k, v in total.items()}, "GFLOPs"),
        timing("its linear layers alone", linear_seconds),
        row("FLOPs of these", {k: v / 1e9 for k, v in linear_counted.items()}, "GFLOPs"),
        row("FLOPs a second in these", speed, "GFLOP/s"),
        timing("all else: attention, norms, GELU, embeddings", rest),
        row("parameters", {"dense": parameters(dense) / 1e6, "KIND": parameters(cut) / 1e6}, "M"),
    ]
    print(format_table(rows, COLUMNS), flush=True)
    facts = {**{k: str(v) for k, v in vars(args).items()}, "threads": torch.get_num_threads()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "kind_speed.json", {**provenance(), **facts, "rows": rows, "flops": counted})
    return rows


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main(args)
