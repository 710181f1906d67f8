# SPDX-License-Identifier: Apache-2.0
"""The steps of the script that evolves circuits: images, evolution, comparison, pictures, publishing."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...data.image_classes import load_images
from ...data.letters import load_letters
from ...runs.plots import curves
from ...runs.report import format_table, provenance, write_json
from ...runs.run import end_run, publish_artefact
from ..plots import draw_lineage
from .artefact import Circuit
from .circuit import parameters
from .evaluation import Starts, compare, draw_novel_tasks, other_starts, pretrain, summarize
from .evolution import Evolution
from .networks import NetworkConfig, create_network
from .options import EvolutionOptions
from .population import Life
from .tasks import ClassImages, Task, split_three


__all__ = ["compare_starts", "draw_comparison", "load_class_images", "publish", "report", "start_evolution"]


def load_class_images(args: Namespace, accelerator: Accelerator) -> tuple[ClassImages, dict[str, list[int]]]:
    """The images that `args` name, or the letters; and their base, critic and novel classes.

    Raises:
        ValueError: no such images or classes.
    """
    with accelerator.main_process_first():
        if args.dataset_name is None and args.train_data_dir is None:
            data = load_letters(args.images_per_class, resolution=args.resolution)
        else:
            data = load_images(args, pool_splits=True)
    classes = split_three(data.class_names, args.base_classes, args.critic_classes, args.novel_classes)
    return ClassImages.of(data), classes


def start_evolution(
    accelerator: Accelerator, images: ClassImages, classes: dict[str, list[int]], args: Namespace
) -> Evolution:
    """The evolution that `args` describe, before its first generation.

    Raises:
        ValueError: see `Evolution`.
    """
    options = EvolutionOptions(
        num_generations=args.num_generations,
        population_size=args.population_size,
        tournament_size=args.tournament_size,
        pool_size=args.pool_size,
        num_ways=args.num_ways,
        life=_life(args, args.life_steps),
        critic_life=_life(args, args.critic_steps),
        critic_tasks=args.critic_tasks,
        critic_shots=args.num_shots,
        validation_shots=args.validation_shots,
        budget=args.budget,
        mutation_probability=0.0 if args.no_mutation else args.mutation_probability,
        mutation_rate=args.mutation_rate,
        selection=args.selection,
        inherit=args.inherit,
        fill=args.fill,
        networks_per_batch=args.networks_per_batch,
        seed=args.seed,
    )
    network = NetworkConfig.named(args.architecture, images.channels)
    return Evolution(accelerator, images, classes, network, options)


def _life(args: Namespace, steps: int) -> Life:
    return Life(steps, batch_size=args.train_batch_size, learning_rate=args.learning_rate)


def draw_comparison(images: ClassImages, classes: dict[str, list[int]], args: Namespace) -> list[Task]:
    """The tasks on novel classes, before any work: afterwards would be late to find out that there are none.

    Raises:
        ValueError: fewer classes than --test_ways, or fewer images of one than the arguments ask for.
    """
    try:
        return draw_novel_tasks(
            images,
            classes["novel"],
            args.test_tasks,
            num_ways=args.test_ways,
            shots=args.num_shots,
            validation_shots=args.validation_shots,
            seed=args.seed,
        )
    except ValueError as error:
        raise ValueError(
            f"--test_ways {args.test_ways} --num_shots {args.num_shots} --validation_shots {args.validation_shots} "
            f"are too many for the {len(classes['novel'])} novel classes: {error}"
        ) from error


def compare_starts(evolution: Evolution, tasks: list[Task], args: Namespace) -> dict[str, dict[str, list[float]]]:
    """Accuracy on novel classes by start and column; see `evaluation`."""
    winner, options = evolution.winner, evolution.options
    lives = 1 + len(evolution.lineage.ancestors(winner.id))
    device, network = evolution.accelerator.device, evolution.network
    trained = pretrain(
        evolution.images,
        evolution.classes["base"],
        network,
        _life(args, lives * options.life.steps),
        seed=options.seed,
        device=device,
    )
    starts: Starts = {
        "descendant": [winner.tensors] * len(tasks),
        **other_starts(trained, network, winner.tensors, len(tasks), seed=options.seed),
    }
    return compare(
        evolution.images,
        tasks,
        network,
        starts,
        _life(args, args.test_steps),
        eval_steps=args.eval_steps,
        seed=options.seed,
        device=device,
    )


def report(evolution: Evolution, found: dict[str, dict[str, list[float]]], args: Namespace) -> dict[str, Any]:
    """Print the table and what follows from it, draw fitness.png, lead.png and lineage.png, write results.json."""
    folder, winner = Path(args.output_dir), evolution.winner
    rows = summarize(found)
    line = [winner.id, *evolution.lineage.ancestors(winner.id)]
    results = {
        **provenance(),
        "settings": _settings(evolution, args),
        "winner": {
            "id": winner.id,
            "fitness": evolution.lineage[winner.id].fitness,
            "score": winner.score,
            "line": line,
            "parameters": parameters(winner.tensors),
            "host_parameters": _host_parameters(evolution),
        },
        "classes": {side: [evolution.images.names[i] for i in own] for side, own in evolution.classes.items()},
        "history": evolution.history,
        "rows": rows,
        "accuracy": found,
    }
    if not evolution.accelerator.is_main_process:
        return results
    history = evolution.history
    curves(
        {
            "fitness of newborns": {
                "mean": [(row["generation"], row["mean"]) for row in history],
                "best": [(row["generation"], row["best"]) for row in history],
                "without a circuit": [(row["generation"], row["without"]) for row in history],
            },
        },
        folder / "fitness.png",
        xlabel="generation",
        ylabel="accuracy of critics",
    )
    leads = {"mean": [(row["generation"], row["mean"] - row["without"]) for row in history]}
    curves(
        {"fitness ahead of networks without a circuit": leads},
        folder / "lead.png",
        xlabel="generation",
        ylabel="difference in accuracy",
    )
    draw_lineage(evolution.lineage, winner.id, folder / "lineage.png")
    share = results["winner"]["parameters"] / results["winner"]["host_parameters"]
    print(
        f"\nThe winner is #{winner.id}, after {len(line)} lives: {results['winner']['parameters']:,} parameters, "
        f"{share:.2%} of its host's.\n\nAccuracy on {args.test_tasks} tasks of {args.test_ways} novel classes, "
        f"{args.num_shots} images of each, by training steps\n{format_table(rows, list(rows[0]))}\n"
    )
    results["findings"] = findings(evolution, found)
    print("\n".join(results["findings"]))
    write_json(folder / "results.json", results)
    write_json(folder / "lineage.json", evolution.lineage.as_json())
    return results


def findings(evolution: Evolution, found: dict[str, dict[str, list[float]]]) -> list[str]:
    """What the numbers say, for the method or against it."""
    gains = [row["mean"] - row["without"] for row in evolution.history]
    third = max(1, len(gains) // 3)
    first, last = (sum(part) / len(part) for part in (gains[:third], gains[-third:]))
    sentences = [
        f"Newborns beat a network without a circuit by {first:+.3f} in the first third of the generations and by "
        f"{last:+.3f} in the last."
    ]
    means = {name: {key: sum(v) / len(v) for key, v in columns.items()} for name, columns in found.items()}
    for name in means:
        if name == "descendant":
            continue
        columns = [column for column in means[name] if column != "0"]  # where all heads are random
        ahead = [column for column in columns if means["descendant"][column] > means[name][column]]
        behind = [column for column in columns if means["descendant"][column] < means[name][column]]
        sentences.append(
            f"Against {name}, the descendant is ahead at {_listed(ahead)}, and behind at {_listed(behind)}."
        )
    return sentences


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) or "none"


def publish(evolution: Evolution, results: dict[str, Any], args: Namespace) -> None:
    """Save the winner with its numbers and pictures in the card, and push it if the arguments say so."""
    accelerator, folder = evolution.accelerator, Path(args.output_dir)
    if accelerator.is_main_process:
        circuit = Circuit.of(
            evolution.winner.tensors,
            evolution.layout,
            evolution.network,
            _host_parameters(evolution),
            training=_settings(evolution, args),
        )
        circuit.card = {
            "images": [folder / "fitness.png", folder / "lead.png", folder / "lineage.png"],
            "results": results["rows"],
            "commit": results["commit"],
        }
        publish_artefact(circuit, folder / "circuit", args)
    end_run(accelerator)


def _host_parameters(evolution: Evolution) -> int:
    state = create_network(evolution.network, 2, seed=0).state_dict()
    return parameters({name: tensor for name, tensor in state.items() if not name.startswith("head.")})


def _settings(evolution: Evolution, args: Namespace) -> dict[str, Any]:
    """What it was evolved with, for the artefact and the results: no path of this machine."""
    options = evolution.options
    names: tuple[str, ...] = (
        "population_size",
        "num_generations",
        "tournament_size",
        "pool_size",
        "num_ways",
        "critic_tasks",
        "budget",
    )
    names += ("mutation_probability", "mutation_rate", "selection", "inherit", "fill", "seed")
    return {
        "architecture": args.architecture,
        "dataset": args.dataset_name or (None if args.train_data_dir else "letters"),
        "resolution": args.resolution,
        **{name: getattr(options, name) for name in names},
        "life_steps": options.life.steps,
        "critic_steps": options.critic_life.steps,
        "num_shots": options.critic_shots,
        "train_batch_size": options.life.batch_size,
        "learning_rate": options.life.learning_rate,
    }
