# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene"]
# ///
"""What WAVE costs in time and memory, as ratios to what people use instead. (No GPU, no data, no downloads.)

    python examples/benchmark/speed.py                       # everything: 8 minutes and 12 GB on two cores
    python examples/benchmark/speed.py --sections step add

step       a training step of a DiT whose weights are generated from templates / of the dense DiT
add        forward + backward of a frozen layer with a WAVE adapter / with PEFT's LoKr of the same factors
condense   DiT-XL/2 -> learngene -> half its depth: seconds, and the memory this takes beside the model's
memory     a descendant of DiT-B/2 / the dense DiT: numbers kept, peak memory of inference and of training
penalty    functional.wave.THIN_MATMUL_PENALTY: how much slower the factored product's FLOPs are than dense ones

All sides of a comparison take turns within one process, so that whatever else the machine does hits them alike; a ratio
is the median of the ratios of the rounds. Below one is in our favour. Memory counts what torch allocates.
"""

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path


SECTIONS = ("step", "add", "condense", "memory", "penalty")
COLUMNS = ("comparison", "ours", "theirs", "unit", "ratio", "target", "met")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9, help="of every comparison")
    parser.add_argument("--num_threads", type=int, help="default: torch's, one a core")
    parser.add_argument("--output_dir", default="outputs/speed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


args = parse_args()  # before the imports that take seconds

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import DiTTransformer2DModel  # noqa: E402
from peft import LoKrConfig, PeftModel, get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from diffusers_learngene import Learngene, WAVEConfig  # noqa: E402
from diffusers_learngene.dit import DIT_SIZES  # noqa: E402
from diffusers_learngene.functional import wave  # noqa: E402
from diffusers_learngene.models import empty_model, tensors_of  # noqa: E402
from diffusers_learngene.training.condensing import ElasticModel  # noqa: E402
from diffusers_learngene.training.report import format_table, provenance, write_json  # noqa: E402


# ------------------------------------------------------------------------------------------------------- measuring


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, in a random order each round; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name in random.sample(list(sides), len(sides)):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch had allocated during `run`, beyond what it had before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def row(comparison: str, ours: float, theirs: float, unit: str, target: float | None, ratio: float | None = None) -> dict:
    ratio = ours / theirs if ratio is None else ratio
    met = None if target is None else "yes" if ratio <= target else "no"
    return {**dict(zip(COLUMNS, (comparison, ours, theirs, unit, ratio, target, met), strict=True))}


def timing(comparison: str, ours: list[float], theirs: list[float], target: float | None = None) -> dict:
    paired = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    values = row(comparison, 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs), "ms", target, paired)
    return {**values, "ratio_of_minima": min(ours) / min(theirs), "seconds": {"ours": ours, "theirs": theirs}}


# ---------------------------------------------------------------------------------------------------------- models


def random_dit(size: str, **overrides: int) -> DiTTransformer2DModel:
    """A DiT for 32 x 32 latents (256 tokens) with random weights, made without the stock initialisation's waiting."""
    model = empty_model("DiTTransformer2DModel", {**DIT_SIZES[size], "sample_size": 32, **overrides})
    state = {name: torch.empty(p.shape).normal_(std=0.02) for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    return model


def dit_batch(size: int) -> dict[str, Tensor]:
    latents, steps, labels = torch.randn(size, 4, 32, 32), torch.randint(1000, (size,)), torch.randint(1000, (size,))
    return {"hidden_states": latents, "timestep": steps, "class_labels": labels}


def training_step(model: nn.Module, call: Callable, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW on whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        F.mse_loss(call(**batch).sample, batch["hidden_states"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# -------------------------------------------------------------------------------------------------------- sections


def step(rounds: int) -> list[dict]:
    """DiT-S/2's widths, 4 blocks, 256 tokens, batch 16."""
    dense, batch = random_dit("S", num_layers=4), dit_batch(16)
    learngene = Learngene.condense(dense)
    sides: dict[str, nn.Module] = {
        "templates and scalers": learngene.descend().requires_grad_(True),
        "scalers only, as after descend": learngene.descend(),
        "as training.condensing does": ElasticModel(learngene, [{}]),
    }
    steps = {name: training_step(model, model, batch) for name, model in sides.items()}
    elastic = sides["as training.condensing does"]
    steps["as training.condensing does"] = training_step(elastic, lambda **inputs: elastic(0, **inputs), batch)
    seconds = take_turns({"dense": training_step(dense, dense, batch), **steps}, rounds)
    dense_seconds = seconds.pop("dense")
    return [timing(f"training step: {name} / dense", values, dense_seconds, 1.10) for name, values in seconds.items()]


class OneLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def with_adapters(in_features: int, out_features: int) -> dict[str, nn.Module]:
    """The same frozen layer alone, with LoKr, and with WAVE: the same weights, so the same function."""
    dense, lokr, ours = (OneLayer(in_features, out_features) for _ in range(3))
    full = 1 << 20  # a rank so large that neither factor is factored further
    lokr = get_peft_model(lokr, LoKrConfig(r=full, alpha=full, target_modules=["layer"], init_weights=False))
    factors = lokr.base_model.model.layer
    w1, w2 = factors.lokr_w1["default"], factors.lokr_w2["default"]
    config = WAVEConfig(num_templates=1, template_size=tuple(w2.shape), share_qkv=False, target_modules=["layer"])
    ours = get_peft_model(ours, config)
    layer = ours.base_model.model.layer
    with torch.no_grad():
        layer.scalers["default"].weight.copy_(w1[None])
        layer.bank("default").templates.copy_(w2[None])
        for model in (lokr, ours):
            model.base_model.model.layer.get_base_layer().load_state_dict(dense.layer.state_dict())
    return {"dense": dense, "lokr": lokr, "wave": ours}


def add(rounds: int) -> list[dict]:
    """2048 tokens. Units of 2 x tokens x in x out FLOPs: the frozen layer takes 1 forward and 1 for the gradient of its
    input, LoKr 3 more with its weight built; so with that gradient no adapter can get below 2 / 5 of LoKr's time."""
    rows = []
    for size in ((1152, 1152), (1152, 4608), (4608, 1152)):
        models = with_adapters(*size)
        x, grad = torch.randn(8, 256, size[0]), torch.randn(8, 256, size[1])
        torch.testing.assert_close(models["wave"](x), models["lokr"](x), rtol=1e-3, atol=1e-4)
        name = f"{size[0]} -> {size[1]}"

        def run(model: nn.Module, x: Tensor, grad: Tensor = grad) -> None:
            y = model(x)
            if y.requires_grad:
                y.backward(grad)

        seconds = take_turns({key: lambda m=model: run(m, x) for key, model in models.items()}, rounds)
        rows.append(timing(f"{name}: WAVE / LoKr, first layer", seconds["wave"], seconds["lokr"], 1 / 3))
        x.requires_grad_()
        seconds = take_turns({key: lambda m=model: run(m, x) for key, model in models.items()}, rounds)
        rows.append(timing(f"{name}: WAVE / LoKr, later layer", seconds["wave"], seconds["lokr"], None))
        best = {key: 1e3 * min(values) for key, values in seconds.items()}
        extra = best["wave"] - best["dense"], best["lokr"] - best["dense"]
        rows.append(row(f"{name}: what they add to it (minima)", *extra, "ms", 1 / 3))
    return rows


def condense(_: int) -> list[dict]:
    model = random_dit("XL")
    size = sum(t.nbytes for t in tensors_of(model).values())
    made: list[Learngene | PeftModel] = []

    def timed(function: Callable) -> float:
        start = time.perf_counter()
        made.append(function())
        return time.perf_counter() - start

    seconds = timed(lambda: Learngene.condense(model))
    learngene = made.pop()
    half = timed(lambda: learngene.descend(num_layers=14))
    made.clear()
    peak = peak_bytes(lambda: Learngene.condense(model))
    return [
        row("Learngene.condense(DiT-XL/2) / a minute", seconds, 60.0, "s", 1.0),
        row("descend(num_layers=14) / ten seconds", half, 10.0, "s", 1.0),
        row("condense: peak beside the model / the model", peak / 1e9, size / 1e9, "GB", None),
        row("numbers: learngene / ancestry", learngene.num_parameters / 1e6, size / 4e6, "M", None),
    ]


def memory(_: int) -> list[dict]:
    """DiT-B/2, batch 2; a training step holds the weights, gradients, AdamW's two moments and the activations."""
    dense, batch = random_dit("B"), dit_batch(2)
    learngene = Learngene.condense(dense)
    models = {"dense": dense, "descend": learngene.descend(), "condense": learngene.descend().requires_grad_(True)}
    kept = {key: sum(t.nbytes for t in tensors_of(model).values()) / 1e6 for key, model in models.items()}
    rows = [row("numbers: descendant of DiT-B/2 / dense", kept["descend"] / 4, kept["dense"] / 4, "M", 0.5)]

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            model(**batch)

    peak = {key: kept[key] + peak_bytes(lambda m=model: infer(m)) / 1e6 for key, model in models.items()}
    rows.append(row("peak of inference: descendant / dense", peak["descend"], peak["dense"], "MB", 0.5))
    for key, model in models.items():
        run = training_step(model, model, batch)
        peak[key] = kept[key] + peak_bytes(lambda: (run(), run())) / 1e6  # noqa: B023
    for key, name in (("descend", "scalers only"), ("condense", "templates and scalers")):
        rows.append(row(f"peak of training: {name} / dense", peak[key], peak["dense"], "MB", 1.0))
    return rows


def penalty(rounds: int) -> list[dict]:
    """Forward and backward of `apply` against `compose` and a matmul, where the arithmetic is about as much."""
    rows = []
    for shape, num, side in (
        ((1152, 1152), 1, 36), ((1152, 1152), 4, 64), ((1152, 1152), 2, 128), ((1152, 1152), 1, 288),
        ((4608, 1152), 4, 64), ((1152, 4608), 4, 64), ((384, 384), 2, 64), ((3072, 3072), 8, 64),
    ):  # fmt: skip
        x, grad = torch.randn(2048, shape[1], requires_grad=True), torch.randn(2048, shape[0])
        templates = torch.randn(num, side, side, requires_grad=True)
        scaler = torch.randn(num, *wave.grid(shape, (side, side)), requires_grad=True)
        factored, built = wave.flops(2048, templates.shape, shape)
        sides = {
            "apply": lambda: wave.apply(x, scaler, templates, shape=shape).backward(grad),  # noqa: B023
            "build": lambda: F.linear(x, wave.compose(scaler, templates, shape=shape)).backward(grad),  # noqa: B023
        }
        seconds = take_turns(sides, rounds)
        timed = timing(f"{shape[1]} -> {shape[0]}, {num} of {side}^2: apply / build", seconds["apply"], seconds["build"])
        rows.append({**timed, "penalty": timed["ratio"] * built / factored})
    measured = statistics.median(r["penalty"] for r in rows)
    rows.append(row("THIN_MATMUL_PENALTY: set / measured (median)", wave.THIN_MATMUL_PENALTY, measured, "x", None))
    return rows


def main(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    rows = []
    for name in args.sections:
        load, found = os.getloadavg()[0], globals()[name](args.rounds)
        rows += [{"section": name, "load_before": load, **values} for values in found]
        print(format_table(found, COLUMNS), "\n", flush=True)
        gc.collect()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {**provenance(), "seed": args.seed, "threads": torch.get_num_threads(), "rounds": args.rounds, "rows": rows}
    write_json(folder / "speed.json", report)
    print(f"wrote {folder / 'speed.json'}")


if __name__ == "__main__":
    main(args)
