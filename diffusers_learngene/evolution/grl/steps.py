# SPDX-License-Identifier: Apache-2.0
"""The steps of the script that evolves genes: settings, evolutions, examination, pictures, publishing."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...runs.checkpoints import resolve_checkpoint
from ...runs.plots import curves
from ...runs.report import format_cell, format_table, provenance, write_json
from ...runs.run import end_run, publish_artefact
from ..plots import draw_lineage
from .artefact import Gene, GeneConfig
from .environment import ANT
from .evaluation import Results, curves_of, summarise
from .evolution import EvolutionConfig, Heritage, Population, evolve, name_of
from .genes import tensors_of
from .life import make_environment
from .pictures import draw_terrains, film
from .presets import PRESETS, Preset
from .workers import Workers


__all__ = ["HERITAGES", "evolutions", "publish", "report", "settings"]

HERITAGES: dict[Heritage, str] = {
    "trained": "trained layers (Lamarck)",
    "birth": "birth layers (Darwin)",
    "random": "random layers",
}


def settings(args: Namespace) -> Preset:
    """The preset of the arguments, with what they change of it; its environment is tried before any work starts.

    Raises:
        ValueError: gymnasium or MuJoCo is missing, a task unknown, or a batch size that no epoch is a multiple of.
    """
    preset = PRESETS[args.preset]
    life = replace(
        preset.evolution.life,
        epochs=args.epochs or preset.evolution.life.epochs,
        steps=args.steps or preset.evolution.life.steps,
        inherit_statistics=args.inherit_statistics,
    )
    evolution = replace(
        preset.evolution,
        life=life,
        population_size=args.population_size or preset.evolution.population_size,
        num_generations=args.num_generations if args.num_generations is not None else preset.evolution.num_generations,
        seed=args.seed,
    )
    if evolution.population_size < evolution.tournament_size:
        raise ValueError(
            f"--population_size {evolution.population_size} is too few for tournaments of {evolution.tournament_size}."
        )
    for task in (*evolution.tasks, *preset.unseen):
        make_environment(life, task).close()
    return replace(preset, evolution=evolution, newborns=args.newborns or preset.newborns)


def evolutions(preset: Preset, workers: Workers, args: Namespace) -> dict[Heritage, Population]:
    """One evolution for every heritage that the arguments name; all go on from their last snapshots if so asked."""
    accelerator, found = workers.accelerator, {}
    for heritage in args.heritages:
        folder = Path(args.output_dir, "checkpoints", heritage)
        resume = resolve_checkpoint(folder, args.resume_from_checkpoint)

        def log(generation: int, numbers: Mapping[str, Any], heritage: Heritage = heritage) -> None:
            plain = {key: value for key, value in numbers.items() if isinstance(value, float)}
            likely = {f"p({name})": value for name, value in numbers["probabilities"].items()}
            accelerator.log({f"{heritage}/{key}": v for key, v in (plain | likely).items()}, step=generation)
            best = max(numbers["probabilities"], key=numbers["probabilities"].__getitem__)
            accelerator.print(
                f"{heritage} layers, generation {generation}: mean return {format_cell(numbers['return'])}, before "
                f"learning {format_cell(numbers['instinct'])}, gene {best}, {numbers['steps per second']:,.0f} steps/s"
            )

        found[heritage] = evolve(
            replace(preset.evolution, heritage=heritage),
            workers,
            folder,
            resume=resume,
            checkpoints_total_limit=args.checkpoints_total_limit,
            log=log,
        )
    return found


def report(
    preset: Preset, populations: Mapping[Heritage, Population], results: Results, args: Namespace
) -> dict[str, Any]:
    """Print the tables, draw the pictures and write results.json; on the main process."""
    folder, best = Path(args.output_dir), populations["trained"]
    winner, life = best.winner(), preset.evolution.life
    rows = summarise(results, preset.unseen)
    history = {heritage: population.history for heritage, population in populations.items()}
    ancestors = best.lineage.ancestors(winner.agent)
    found = {
        **provenance(),
        "preset": args.preset,
        "eased": preset.eased,
        "evolution": asdict(preset.evolution),
        "winner": {"agent": winner.agent, "gene": name_of(winner.gene_type), "depth of its tree": len(ancestors)},
        "rows": rows,
        "curves": curves_of(results),
        "history": history,
    }
    print(f"\nReturns of newborns, {preset.newborns} on each task\n{format_table(rows, list(rows[0]))}\n")
    print(f"The winner is {name_of(winner.gene_type)} of agent {winner.agent}, whose tree is {len(ancestors)} deep.")
    for key, title in (("return", "mean over the life"), ("instinct", "before any learning")):
        found.setdefault("panels", {})[title] = {
            HERITAGES[heritage]: [(g, record[key]) for g, record in enumerate(records) if record[key] is not None]
            for heritage, records in history.items()
        }
    curves(found["panels"], folder / "generations.png", xlabel="generation", ylabel="mean return of newborns")
    types = list(best.history[0]["probabilities"])
    likely = sorted(types, key=lambda name: -best.history[-1]["probabilities"][name])
    logits = {name: [(g, record["probabilities"][name]) for g, record in enumerate(best.history)] for name in likely}
    groups = {f"{first + 1} to {first + 5}": dict(list(logits.items())[first : first + 5]) for first in (0, 5, 10)}
    found["logits"] = logits
    curves(
        {f"types of genes, {title}": series for title, series in groups.items()},
        folder / "logits.png",
        xlabel="generation",
        ylabel="probability of the type",
    )
    curves(found["curves"], folder / "learning.png", xlabel=f"epochs of {life.steps:,} steps", ylabel="mean return")
    draw_lineage(best.lineage, winner.agent, folder / "lineage.png", facts=["task"])
    if life.environment == ANT:
        draw_terrains((*preset.evolution.tasks, *preset.unseen), folder / "terrains.png")
    try:
        film(life, preset.evolution.tasks[0], best.heirs[winner.agent], folder / "agent.gif")
    except RuntimeError as error:
        print(f"No agent.gif: {error}")
    write_json(folder / "results.json", found)
    return found


def publish(
    accelerator: Accelerator, preset: Preset, population: Population, results: dict[str, Any], args: Namespace
) -> None:
    """Save the best gene with its numbers and pictures in the card, and push it if the arguments say so."""
    if accelerator.is_main_process:
        gene = best_gene(population, preset.evolution)
        pictures = ("generations.png", "learning.png", "lineage.png")
        gene.card = {
            "images": [Path(args.output_dir, name) for name in pictures],
            "results": [{key: format_cell(value) for key, value in row.items()} for row in results["rows"]],
            "commit": results["commit"],
        }
        publish_artefact(gene, Path(args.output_dir, "gene"), args)
    end_run(accelerator)


def best_gene(population: Population, config: EvolutionConfig) -> Gene:
    """The answer of an evolution as an artefact."""
    winner = population.winner()
    arrays = tensors_of(population.heirs[winner.agent].actor, winner.gene_type)
    life = config.life
    return Gene(
        GeneConfig(
            gene_type=list(winner.gene_type),
            shapes={name: list(array.shape) for name, array in arrays.items()},
            environment=life.environment,
            tasks=list(config.tasks),
            training={
                "population_size": config.population_size,
                "num_generations": config.num_generations,
                "epochs": life.epochs,
                "steps": life.steps,
                "learning_rate": life.learning_rate,
                "inherit_statistics": life.inherit_statistics,
                "seed": config.seed,
            },
        ),
        {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
    )
