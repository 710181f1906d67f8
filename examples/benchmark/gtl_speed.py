# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""What a training step of a population costs: one network after another, as grouped convolutions, and with vmap.

    python examples/benchmark/gtl_speed.py                                              # the size of the default run
    python examples/benchmark/gtl_speed.py --architecture vgg11 --networks 32 --resolution 32 --device cuda

All three take turns in one process on the same images; what is reported is the median step, for all networks.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vgg11-smoke", help="as of train_gtl.py")
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_dir", type=Path, default="outputs/gtl_speed")
    return parser.parse_args(input_args)


args = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timing import take_turns  # noqa: E402
from torch.func import functional_call, grad, stack_module_state, vmap  # noqa: E402

from diffusers_learngene.evolution.gtl.networks import NetworkConfig, create_network  # noqa: E402
from diffusers_learngene.evolution.gtl.population import Population  # noqa: E402
from diffusers_learngene.runs.report import format_table, provenance, write_json  # noqa: E402


def main(args: argparse.Namespace) -> dict:
    config = NetworkConfig.named(args.architecture, 1)
    networks = [create_network(config, 5, seed=seed).to(args.device) for seed in range(args.networks)]
    draws = torch.Generator().manual_seed(0)
    shape = (args.networks, args.batch_size, 1, args.resolution, args.resolution)
    images = torch.randn(shape, generator=draws).to(args.device)
    labels = torch.randint(5, shape[:2], generator=draws).to(args.device)

    def after_another() -> None:
        for network, own_images, own_labels in zip(networks, images, labels, strict=True):
            network.zero_grad()
            F.cross_entropy(network(own_images), own_labels).backward()

    population = Population(networks)

    def grouped() -> None:
        population.zero_grad()
        F.cross_entropy(population(images).flatten(0, 1), labels.flatten(), reduction="sum").backward()

    parameters, buffers = stack_module_state(networks)

    def loss(parameters: dict, buffers: dict, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(networks[0], (parameters, buffers), (images,)), labels)

    def vmapped() -> None:
        vmap(grad(loss))(parameters, buffers, images, labels)

    ways: dict[str, Callable[[], None]] = {"one after another": after_another, "grouped": grouped, "vmap": vmapped}
    seconds = take_turns(ways, args.rounds, args.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {"way": name, "ms a step": 1000 * median, "ratio": medians["one after another"] / median}
        for name, median in medians.items()
    ]
    print(format_table(rows, list(rows[0])))
    settings = {key: str(value) if key == "output_dir" else value for key, value in vars(args).items()}
    results = {**provenance(), "settings": settings, "threads": torch.get_num_threads(), "rows": rows}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "speed.json", results)
    return results


if __name__ == "__main__":
    main(args)
