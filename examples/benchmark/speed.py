# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene"]
# ///
"""What WAVE and FINE cost in time and memory, as ratios to what people use instead. (No GPU, no data, no downloads.)

    python examples/benchmark/speed.py                       # everything: a quarter of an hour and 12 GB on two cores
    python examples/benchmark/speed.py --sections step add --methods wave

step       a training step of a DiT whose weights are generated from a bank / of the dense DiT
adapters   a training step of a DiT with a FINE adapter / with PEFT's LoRA and VeRA
add        forward + backward of a frozen layer with a WAVE adapter / with PEFT's LoKr of the same factors
condense   DiT-XL/2 -> learngene -> half its depth: seconds, and the memory this takes beside the model's
memory     a descendant of DiT-B/2 / the dense DiT: numbers kept, peak memory of inference and of training
penalty    functional.wave.THIN_MATMUL_PENALTY: how much slower the factored product's FLOPs are than dense ones

All sides of a comparison take turns within one process, so that whatever else the machine does hits them alike; a
ratio is the median of the ratios of the rounds. Below one is in our favour. Memory counts what torch allocates.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, product
from pathlib import Path


NAMES = ("step", "adapters", "add", "condense", "memory", "penalty")
METHODS = ("wave", "fine")
COLUMNS = ("comparison", "ours", "theirs", "unit", "ratio", "target", "met")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the sections for both"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of every comparison")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 2048], help="of the section add")
    parser.add_argument("--output_dir", type=Path, default="outputs/speed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


args = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write into the table

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import DiTTransformer2DModel  # noqa: E402
from peft import LoKrConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model  # noqa: E402
from timing import seconds_of, take_turns  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from diffusers_learngene import FINEConfig, Learngene, WAVEConfig  # noqa: E402
from diffusers_learngene.anatomy.dit import DIT_SIZES  # noqa: E402
from diffusers_learngene.anatomy.models import empty_model  # noqa: E402
from diffusers_learngene.anatomy.tensors import tensors_of  # noqa: E402
from diffusers_learngene.functional import wave  # noqa: E402
from diffusers_learngene.learngene.methods.protocol import Start  # noqa: E402
from diffusers_learngene.runs.report import format_table, provenance, write_json  # noqa: E402
from diffusers_learngene.training.condensing import ElasticModel  # noqa: E402
from diffusers_learngene.tuners.base_config import LearngeneConfig  # noqa: E402


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch had allocated during `run`, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def row(name: str, ours: float, theirs: float, unit: str, target: float | None = None, ratio: float = 0.0) -> dict:
    ratio = ratio or ours / theirs
    met = None if target is None else "yes" if ratio <= target else "no"
    return dict(zip(COLUMNS, (name, ours, theirs, unit, ratio, target, met), strict=True))


def timing(name: str, ours: list[float], theirs: list[float], target: float | None = None) -> dict:
    paired = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    values = row(name, 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs), "ms", target, paired)
    return {**values, "ratio_of_minima": min(ours) / min(theirs), "seconds": {"ours": ours, "theirs": theirs}}


def random_dit(size: str, **overrides: int) -> DiTTransformer2DModel:
    """A DiT for 32 x 32 latents (256 tokens) with random weights, made without the stock initialisation's waiting."""
    model = empty_model("DiTTransformer2DModel", {**DIT_SIZES[size], "sample_size": 32, **overrides})
    state = {name: torch.empty(p.shape).normal_(std=0.02) for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    return model


def parameter_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


def dit_batch(size: int) -> dict[str, Tensor]:
    latents, steps, labels = torch.randn(size, 4, 32, 32), torch.randint(1000, (size,)), torch.randint(1000, (size,))
    return {"hidden_states": latents, "timestep": steps, "class_labels": labels}


def training_step(model: nn.Module, call: Callable, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW on whatever is trainable."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        F.mse_loss(call(**batch).sample, batch["hidden_states"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generating(methods: Sequence[str]) -> dict[str, LearngeneConfig]:
    """Configs of the methods that were asked for."""
    configs: dict[str, LearngeneConfig] = {"wave": WAVEConfig(mode="generate"), "fine": FINEConfig(mode="generate")}
    return {name.upper(): configs[name] for name in methods}


def step(args: argparse.Namespace) -> list[dict]:
    """DiT-S/2's widths, 4 blocks, 256 tokens, batch 16."""
    dense, batch = random_dit("S", num_layers=4), dit_batch(16)
    steps = {}
    for name, config in generating(args.methods).items():
        learngene = Learngene.condense(dense, config)
        sides = {"bank and scalers": learngene.descend().requires_grad_(True), "scalers only": learngene.descend()}
        steps |= {f"{name}, {key}": training_step(model, model, batch) for key, model in sides.items()}
        elastic = ElasticModel(learngene, [{}])
        steps[f"{name}, as training.condensing does"] = training_step(elastic, partial(elastic, 0), batch)
    seconds = take_turns({"dense": training_step(dense, dense, batch), **steps}, args.rounds)
    return [timing(f"training step: {name} / dense", seconds[name], seconds["dense"], 1.10) for name in steps]


def adapters(args: argparse.Namespace) -> list[dict]:
    """DiT-S/2's widths, 4 blocks, 256 tokens, batch 16. FINE shares U and V: for LoRA's trainable numbers it has four
    times LoRA's rank here, and with L layers L times; VeRA trains two vectors a matrix, whatever its rank."""
    batch, models = dit_batch(16), {}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear"]
    configs: dict[str, PeftConfig] = {
        "FINE r=64": FINEConfig(r=64, target_modules=targets),
        "LoRA r=15": LoraConfig(r=15, target_modules=targets),
        "VeRA r=256": VeraConfig(r=256, target_modules=targets),
    }
    for name, config in configs.items():
        torch.manual_seed(args.seed)
        models[name] = get_peft_model(random_dit("S", num_layers=4), config)
    numbers = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    seconds = take_turns({name: training_step(model, model, batch) for name, model in models.items()}, args.rounds)
    ours, *others = models
    return [
        row(f"trainable numbers: {ours} / {other}", numbers[ours] / 1e6, numbers[other] / 1e6, "M") for other in others
    ] + [timing(f"training step: {ours} / {other}", seconds[ours], seconds[other], 1.10) for other in others]


def with_adapters(in_features: int, out_features: int) -> dict[str, nn.Module]:
    """The same frozen layer alone, with LoKr, and with WAVE: the same weights, so the same function."""
    dense, lokr, ours = (nn.Sequential(nn.Linear(in_features, out_features)).requires_grad_(False) for _ in range(3))
    lokr.load_state_dict(dense.state_dict())
    ours.load_state_dict(dense.state_dict())
    full = 1 << 20  # a rank so large that neither factor is factored further
    lokr = get_peft_model(lokr, LoKrConfig(r=full, alpha=full, target_modules=["0"], init_weights=False))
    w1, w2 = (getattr(lokr.base_model.model[0], name)["default"].detach() for name in ("lokr_w1", "lokr_w2"))
    ours = get_peft_model(ours, WAVEConfig(num_templates=1, template_size=tuple(w2.shape), target_modules=["0"]))
    layer = ours.base_model.model[0]
    layer.scalers["default"].weight.data.copy_(w1[None])
    layer.bank("default").templates.data.copy_(w2[None])
    return {"dense": dense, "lokr": lokr, "wave": ours}


def backward(function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], grad: Tensor) -> None:
    """Forward, and the gradients of the parameters and of x if it wants one."""
    inputs, y = [*parameters, *([x] if x.requires_grad else [])], function(x)
    if inputs:
        torch.autograd.grad(y, inputs, grad)


def add(args: argparse.Namespace) -> list[dict]:
    """In units of 2 x tokens x in x out FLOPs the frozen layer takes 1, and 1 more for the gradient of its input.

    LoKr, which builds its weight, adds 2, or 3 with that gradient, and the building. So an adapter that costs nothing
    gets to 1 / 3 of LoKr's time in the first layer and to 2 / 5 in a later one where tokens are many, and to less
    where they are few ("nothing / LoKr"); beyond that, compare what the two add.
    """
    rows = []
    for size, tokens in product(((1152, 1152), (1152, 4608), (4608, 1152)), args.tokens):
        models = with_adapters(*size)
        x, grad = torch.randn(tokens, size[0]), torch.randn(tokens, size[1])
        torch.testing.assert_close(models["wave"](x), models["lokr"](x), rtol=1e-3, atol=1e-4)
        wanted = {k: [p for p in model.parameters() if p.requires_grad] for k, model in models.items()}
        for place in ("first", "later"):
            x.requires_grad_(place == "later")
            sides = {k: partial(backward, model, x, wanted[k], grad) for k, model in models.items()}
            seconds = take_turns(sides, args.rounds)
            name = f"{size}, {tokens} tokens, {place} layer"
            rows.append(timing(f"{name}: WAVE / LoKr", seconds["wave"], seconds["lokr"], 1 / 3))
            rows.append(timing(f"{name}: nothing / LoKr", seconds["dense"], seconds["lokr"]))
            best = {key: 1e3 * min(values) for key, values in seconds.items()}
            extra = best["wave"] - best["dense"], best["lokr"] - best["dense"]
            rows.append(row(f"{name}: what they add to it (of minima)", *extra, "ms", 1 / 3))
    return rows


def condense(args: argparse.Namespace) -> list[dict]:
    model = random_dit("XL")
    size = parameter_bytes(model)
    rows: list[dict] = []
    starts: tuple[Start, ...] = ("layers", "fit")
    for name, config in generating(args.methods).items():
        for start in starts:
            make, title = partial(Learngene.condense, model, config, start=start), f'{name}, start="{start}"'
            rows.append(row(f"condense(DiT-XL/2), {title} / a minute", seconds_of(make), 60.0, "s", 1.0))
            rows.append(row(f"peak of it beside the model, {title} / model", peak_bytes(make) / 1e9, size / 1e9, "GB"))
        learngene = Learngene.condense(model, config)
        half = seconds_of(partial(learngene.descend, num_layers=14))
        rows.append(row(f"{name}: descend(num_layers=14) / ten seconds", half, 10.0, "s", 1.0))
        rows.append(row(f"numbers: {name} learngene / DiT-XL/2", learngene.num_parameters / 1e6, size / 4e6, "M"))
    return rows


def memory(args: argparse.Namespace) -> list[dict]:
    """DiT-B/2, batch 2; a training step holds the weights, gradients, AdamW's two moments and the activations."""
    dense, batch, rows = random_dit("B"), dit_batch(2), []
    infer = torch.no_grad()(lambda model: model(**batch))
    theirs = parameter_bytes(dense) / 1e6
    theirs_inferring = theirs + peak_bytes(partial(infer, dense)) / 1e6
    run = training_step(dense, dense, batch)
    theirs_training = theirs + peak_bytes(lambda: (run(), run())) / 1e6
    for name, config in generating(args.methods).items():
        learngene = Learngene.condense(dense, config)
        model = learngene.descend()
        kept = parameter_bytes(model) / 1e6
        inferring = kept + peak_bytes(partial(infer, model)) / 1e6
        rows.append(row(f"{name}: numbers of a descendant / dense DiT-B/2", kept / 4, theirs / 4, "M", 0.5))
        rows.append(row(f"{name}: peak of inference / dense", inferring, theirs_inferring, "MB", 0.5))
        for kind, trained in (("scalers only", model), ("bank and scalers", learngene.descend().requires_grad_(True))):
            run = training_step(trained, trained, batch)
            peak = kept + peak_bytes(lambda: (run(), run())) / 1e6  # noqa: B023
            rows.append(row(f"{name}: peak of training, {kind} / dense", peak, theirs_training, "MB", 1.05))
    return rows


def penalty(args: argparse.Namespace) -> list[dict]:
    """Forward and backward of `apply` against `compose` and a matmul, where neither is much more arithmetic."""
    rows = []
    square = [(1152, 1152, 1, 36), (1152, 1152, 4, 64), (1152, 1152, 2, 128), (384, 384, 2, 64), (3072, 3072, 8, 64)]
    for m2, m1, num, side in (*square, (1152, 4608, 4, 64), (4608, 1152, 4, 64)):
        scaler = torch.randn(num, *wave.grid((m1, m2), (side, side)), requires_grad=True)
        templates = torch.randn(num, side, side, requires_grad=True)
        x, grad = torch.randn(2048, m2, requires_grad=True), torch.randn(2048, m1)
        forwards: dict[str, Callable] = {
            "factored": lambda x: wave.apply(x, scaler, templates, shape=(m1, m2)),  # noqa: B023
            "built": lambda x: F.linear(x, wave.compose(scaler, templates, shape=(m1, m2))),  # noqa: B023
        }
        parameters = [scaler, templates]
        seconds = take_turns({k: partial(backward, f, x, parameters, grad) for k, f in forwards.items()}, args.rounds)
        name = f"{m2} -> {m1}, {num} of {side} x {side}: factored / built"
        timed = timing(name, seconds["factored"], seconds["built"])
        flops = wave.flops(2048, templates.shape, (m1, m2))
        rows.append({**timed, "penalty": timed["ratio"] * flops[1] / flops[0]})
    measured = statistics.median(r["penalty"] for r in rows)
    return [*rows, row("THIN_MATMUL_PENALTY: set / median of these", wave.THIN_MATMUL_PENALTY, measured, "x")]


SECTIONS = dict(zip(NAMES, (step, adapters, add, condense, memory, penalty), strict=True))


def main(args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(args.seed)
    rows = []
    for name in args.sections:
        load, found = os.getloadavg()[0], SECTIONS[name](args)
        rows += [{"section": name, "load_before": load, **values} for values in found]
        print(format_table(found, COLUMNS), "\n", flush=True)
        gc.collect()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"seed": args.seed, "threads": torch.get_num_threads(), "rounds": args.rounds}
    write_json(args.output_dir / "speed.json", {**provenance(), **facts, "rows": rows})
    return rows


if __name__ == "__main__":
    main(args)
