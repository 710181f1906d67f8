# SPDX-License-Identifier: Apache-2.0
"""How the run of a script starts, how what it made is published, and how it ends."""

from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import create_repo

from ..hub.shared import SharedArtefact
from .tracking import create_accelerator


__all__ = ["end_run", "publish_artefact", "start_run", "start_training_run"]


def start_run(
    name: str, args: Namespace, *, mixed_precision: str | None = None, gradient_accumulation_steps: int = 1
) -> Accelerator:
    """The accelerator of a run and its trackers; a repository to push to is made now, where a wrong name shows."""
    accelerator = create_accelerator(
        name,
        output_dir=Path(args.output_dir),
        config={key: value for key, value in vars(args).items() if key != "hub_token"},
        report_to=args.report_to,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repo(args.hub_model_id, token=args.hub_token, exist_ok=True).repo_id
    return accelerator


def start_training_run(name: str, args: Namespace) -> Accelerator:
    """`start_run` of a script whose user chooses the precision and how many batches make a step."""
    return start_run(
        name,
        args,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def publish_artefact(artefact: SharedArtefact, folder: str | Path, args: Namespace) -> None:
    """Save an artefact, whose card says what it is to say, and push it if the arguments say so: on one process."""
    artefact.card |= {"repo_id": args.hub_model_id, "license": args.license}
    artefact.save_pretrained(folder)
    if args.push_to_hub:
        artefact.push_to_hub(args.hub_model_id, token=args.hub_token)


def end_run(accelerator: Accelerator) -> None:
    """Wait for the process that publishes, and close the trackers."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
