# SPDX-License-Identifier: Apache-2.0
"""From the arguments that the scripts share, in diffusers' words, to what they stand for."""

from argparse import Namespace
from typing import Any

from accelerate import Accelerator

from .classification_task import ClassificationTask, load_classifier
from .data import load_image_classes
from .diffusion_task import DiffusionTask, load_dit
from .loop import TrainingOptions
from .tasks import Task


__all__ = ["load_task", "training_options"]


def load_task(args: Namespace, accelerator: Accelerator) -> tuple[Task, Any]:
    """The task on the images that `args` name, and its ancestry model: loaded, or new and untrained.

    Raises:
        ValueError: no such images or model, or a model that cannot take the images or their classes.
    """
    with accelerator.main_process_first():  # it downloads and encodes; the others read what it wrote
        data = load_image_classes(
            args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            train_data_dir=args.train_data_dir,
            image_column=args.image_column,
            label_column=args.label_column,
            resolution=args.resolution,
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            seed=args.seed,
            broken_images=args.broken_images,
        )
        name, where = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
        task: DiffusionTask | ClassificationTask
        if args.task == "diffusion":
            model, vae = load_dit(name, **where) if name else (None, None)
            task = DiffusionTask(
                data,
                vae=vae,
                latents_dir=f"{args.output_dir}/latents",
                noise_weight=args.noise_weight,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                seed=args.seed,
                device=accelerator.device,
            )
        else:
            model = load_classifier(name, **where) if name else None
            task = ClassificationTask(data, alpha=args.alpha, tau=args.tau)
        if model is None:
            sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
            model = task.new_model(seed=args.seed, **{key: getattr(args, key) for key in sizes})
    task.check_model(model)
    return task, model


def training_options(args: Namespace) -> TrainingOptions:
    """How to train, as `args` say."""
    return TrainingOptions(
        max_train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler=args.lr_scheduler,
        lr_warmup_steps=args.lr_warmup_steps,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        ema_decay=args.ema_decay if args.use_ema else None,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from_checkpoint=args.resume_from_checkpoint,
        dataloader_num_workers=args.dataloader_num_workers,
    )
