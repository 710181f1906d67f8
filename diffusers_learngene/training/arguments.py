# SPDX-License-Identifier: Apache-2.0
"""From the arguments that the scripts share, in diffusers' words, to what they stand for."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiTTransformer2DModel

from ..data.class_split import read_class_groups, select_classes, split_classes
from ..data.image_classes import ImageClasses, load_images
from ..runs.loop import TrainingOptions
from .classification_task import ClassificationTask, load_classifier
from .diffusion_task import DiffusionTask, check_dit, load_dit, model_shape
from .tasks import Task, check_patch_size
from .ways import with_classes


__all__ = ["load_class_tasks", "load_task", "training_options"]


def load_task(args: Namespace, accelerator: Accelerator) -> tuple[Task, Any]:
    """The task on the images that `args` name, and its ancestry model: loaded, or new and untrained.

    Raises:
        ValueError: no such images or model, or a model that cannot take the images or their classes.
    """
    with accelerator.main_process_first():  # it downloads and encodes; the others read what it wrote
        data = load_images(args, random_flip=args.random_flip)
        task: DiffusionTask | ClassificationTask
        if args.task == "diffusion":
            model, vae = _load_dit(args)
            _check_before_encoding(args, model, data, vae)
            task = _diffusion_task(args, accelerator, data, vae, noise_weight=args.noise_weight)
        else:
            name = args.pretrained_model_name_or_path
            model = load_classifier(name, revision=args.revision, variant=args.variant) if name else None
            task = ClassificationTask(data, alpha=args.alpha, tau=args.tau)
        if model is None:
            model = _new_model(args, task)
    task.check_model(model)
    return task, model


def load_class_tasks(
    args: Namespace, accelerator: Accelerator
) -> tuple[DiffusionTask, DiffusionTask, DiTTransformer2DModel, list[list[int]] | None]:
    """The tasks of the base and of the novel classes that `args` name, a model of the base classes, and their groups.

    Labels count the base classes, then the novel ones. A loaded model's labels are taken to be those of the data; of
    its label rows, those of the base classes and of the null class are kept.

    Raises:
        ValueError: as `load_task`; and classes that `split_classes` or `read_class_groups` refuse.
    """
    with accelerator.main_process_first():
        data = load_images(args, random_flip=args.random_flip)
        split = split_classes(
            data, args.base_classes, args.novel_classes, images_per_novel_class=args.images_per_novel_class
        )
        names = split.novel.class_names
        groups = read_class_groups(args.class_groups, names[: split.num_base]) if args.class_groups else None
        model, vae = _load_dit(args)
        old = split.classes[: split.num_base]
        if model is not None and max(old) >= (known := model.config.num_embeds_ada_norm):
            raise ValueError(
                f"the base classes are numbers up to {max(old)} in the data, but the model knows {known}."
            )
        model = model if model is None else with_classes(model, old)
        _check_before_encoding(args, model, split.base, vae)
        base = _diffusion_task(args, accelerator, split.base, vae, part="base")
        novel = _diffusion_task(
            args,
            accelerator,
            split.novel,
            vae,
            part="novel",
            labels=range(split.num_base, len(names)),
            feature_data=select_classes(data, split.classes),
        )
        model = model or _new_model(args, base)
    base.check_model(model)
    return base, novel, model, groups


def _load_dit(args: Namespace) -> tuple[Any, Any]:
    """The DiT that `args` name, and its VAE; None of either if they name none."""
    name = args.pretrained_model_name_or_path
    return load_dit(name, revision=args.revision, variant=args.variant) if name else (None, None)


def _check_before_encoding(args: Namespace, model: Any, data: ImageClasses, vae: Any) -> None:
    """Raise a ValueError if the model, or one that is to be made, cannot take the images, of which the VAE may have
    hours to make latents."""
    if model is None:
        check_patch_size(args.patch_size, model_shape(data, vae)[1])
    else:
        check_dit(model, data, vae)


def _diffusion_task(
    args: Namespace, accelerator: Accelerator, data: ImageClasses, vae: Any, part: str = "", **options: Any
) -> DiffusionTask:
    return DiffusionTask(
        data,
        vae=vae,
        latents_dir=str(Path(args.output_dir, "latents", part)),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        device=accelerator.device,
        **options,
    )


def _new_model(args: Namespace, task: DiffusionTask | ClassificationTask) -> Any:
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
    return task.new_model(seed=args.seed, **{key: getattr(args, key) for key in sizes})


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
