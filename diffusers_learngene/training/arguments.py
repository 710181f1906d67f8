# SPDX-License-Identifier: Apache-2.0
"""From the arguments that the scripts share, in diffusers' words, to what they stand for."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from torch import nn

from ..anatomy.belongings import Belongings, belongings_of
from ..data.class_split import read_class_groups, relabel_classes, select_classes, split_classes
from ..data.image_classes import ImageClasses, load_images
from ..data.labels import label_names, match_labels, read_label_map
from ..runs.loop import TrainingOptions
from .classification_task import ClassificationTask
from .diffusion_task import DiffusionTask, check_dit
from .pretrained import PretrainedDiT, load_classifier, load_dit, load_image_processor
from .tasks import Task, check_patch_size
from .ways import with_classes


__all__ = ["load_belongings", "load_class_tasks", "load_task", "training_options"]


def load_task(args: Namespace, accelerator: Accelerator) -> tuple[Task, Any]:
    """The task on the images that `args` name, and its ancestry model: loaded, or new and untrained.

    Raises:
        ValueError: no such images or model, or a model that cannot take the images or their classes.
    """
    with accelerator.main_process_first():  # it downloads and encodes; the others read what it wrote
        task: DiffusionTask | ClassificationTask
        if args.task == "diffusion":
            brought = _load_dit(args)
            data = _load_images(args, brought)
            _check_before_encoding(args, brought, data)
            ids = None
            if brought is not None:
                ids = match_labels(data.class_names, brought.labels, _label_map(args))
                data = relabel_classes(data, ids, brought.labels)
            task = _diffusion_task(args, accelerator, data, brought, labels=ids, noise_weight=args.noise_weight)
            model: Any = None if brought is None else brought.transformer
        else:
            model, data = _load_classification(args)
            task = ClassificationTask(data, alpha=args.alpha, tau=args.tau)
        if model is None:
            model = _new_model(args, task)
    task.check_model(model)
    return task, model


def _load_classification(args: Namespace) -> tuple[Any, ImageClasses]:
    """The classifier that `args` name, if any, and the images as it takes them, under its labels."""
    name = args.pretrained_model_name_or_path
    if not name:
        return None, load_images(args, random_flip=args.random_flip)
    model = load_classifier(name, revision=args.revision, variant=args.variant)
    data = load_images(
        args,
        random_flip=args.random_flip,
        image_processor=load_image_processor(name, revision=args.revision),
        channels=getattr(model.config, "num_channels", 3),
    )
    labels = label_names(model.config.id2label, model.config.num_labels)
    return model, relabel_classes(data, match_labels(data.class_names, labels, _label_map(args)), labels)


def _label_map(args: Namespace) -> dict[str, int] | None:
    return read_label_map(args.label_map) if args.label_map else None


def load_class_tasks(
    args: Namespace, accelerator: Accelerator
) -> tuple[DiffusionTask, DiffusionTask, DiTTransformer2DModel, list[list[int]] | None]:
    """The tasks of the base and of the novel classes that `args` name, a model of the base classes, and their groups.

    Labels count the base classes, then the novel ones. Of a loaded model's label rows, those of the base classes,
    which it has to know, and of the null class are kept.

    Raises:
        ValueError: as `load_task`; and classes that `split_classes` or `read_class_groups` refuse.
    """
    with accelerator.main_process_first():
        brought = _load_dit(args)
        data = _load_images(args, brought)
        split = split_classes(
            data, args.base_classes, args.novel_classes, images_per_novel_class=args.images_per_novel_class
        )
        names = split.novel.class_names
        groups = read_class_groups(args.class_groups, names[: split.num_base]) if args.class_groups else None
        if brought is not None:
            known = names[: split.num_base]
            ids = match_labels(known, brought.labels, _label_map(args), among=data.class_names)
            brought = replace(brought, transformer=with_classes(brought.transformer, ids), labels=known)
        _check_before_encoding(args, brought, split.base)
        base = _diffusion_task(args, accelerator, split.base, brought, part="base")
        novel = _diffusion_task(
            args,
            accelerator,
            split.novel,
            brought,
            part="novel",
            labels=range(split.num_base, len(names)),
            feature_data=select_classes(data, split.classes),
        )
        model = _new_model(args, base) if brought is None else brought.transformer
    base.check_model(model)
    return base, novel, model, groups


def _load_dit(args: Namespace) -> PretrainedDiT | None:
    """The DiT that `args` name, if they name one."""
    name = args.pretrained_model_name_or_path
    return load_dit(name, revision=args.revision, variant=args.variant) if name else None


def _load_images(args: Namespace, brought: PretrainedDiT | None) -> ImageClasses:
    """The images that `args` name, of the size that the DiT makes if they name none."""
    resolution = None if brought is None else brought.resolution
    return load_images(args, random_flip=args.random_flip, resolution=resolution)


def _check_before_encoding(args: Namespace, brought: PretrainedDiT | None, data: ImageClasses) -> None:
    """Raise a ValueError if the model, or one that is to be made, cannot take the images, of which the VAE may have
    hours to make latents."""
    if brought is None:
        check_patch_size(args.patch_size, data.resolution)
    else:
        check_dit(brought.transformer, data, brought.vae)


def _diffusion_task(
    args: Namespace,
    accelerator: Accelerator,
    data: ImageClasses,
    brought: PretrainedDiT | None,
    part: str = "",
    **options: Any,
) -> DiffusionTask:
    return DiffusionTask(
        data,
        vae=None if brought is None else brought.vae,
        scheduler=None if brought is None else brought.scheduler,
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


def load_belongings(args: Namespace, task: Task, model: nn.Module) -> Belongings:
    """What belongs to the ancestry: what lies beside a loaded one, and what the images say."""
    name = args.pretrained_model_name_or_path
    found = belongings_of(model, name, revision=args.revision) if name else Belongings()
    return replace(found, small=replace(found.small, **task.companions))


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
