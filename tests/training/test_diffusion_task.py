# SPDX-License-Identifier: Apache-2.0
"""What a diffusion task measures on, and what it refuses before it encodes an image."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from diffusers_learngene.anatomy.dit import create_dit
from diffusers_learngene.data.image_classes import ImageClasses
from diffusers_learngene.data.images import LabelledImages
from diffusers_learngene.data.labels import label_names
from diffusers_learngene.training import arguments, diffusion_task
from diffusers_learngene.training.diffusion_task import DiffusionTask
from diffusers_learngene.training.pretrained import PretrainedDiT


NAMES = ["ant", "bee", "cat"]


def sorted_images(each, resolution=4):
    """As many of each class, class by class; the first pixel says the class, the others which of them it is."""
    labels = np.repeat(np.arange(len(NAMES)), each)
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(resolution, 2).repeat(resolution, 3)
    pixels[:, 0, 0, 0] = 100 * labels
    return LabelledImages(pixels, labels)


def images(each=30, resolution=4):
    return ImageClasses(sorted_images(each, resolution), sorted_images(each, resolution), NAMES, 1, resolution)


@pytest.fixture
def few(monkeypatch):
    """A limit that the data exceed."""
    monkeypatch.setattr(diffusion_task, "MAX_REAL", 30)


def test_many_real_images_are_drawn_from_all_classes(few, monkeypatch):
    seen = []
    features = lambda x: x.flatten(1).double().numpy()  # noqa: E731
    monkeypatch.setattr(diffusion_task, "classifier_features", lambda *images, seed: seen.append(images) or features)
    task, other = DiffusionTask(images()), DiffusionTask(images(), seed=1)
    for one in (task, DiffusionTask(images()), other):
        one.frechet_distance(torch.rand(30, 1, 4, 4))
    for pixels, labels in seen:
        assert len(labels) == 30 and len(set(labels.tolist())) == 3
        assert len({image[0, 1, 1].item() for image in pixels}) == 30  # none twice
        assert torch.equal((pixels[:, 0, 0, 0] + 1) * 127.5 / 100, labels.float())
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][0], seen[2][0])
    assert len(task.training_images()) == 30


def test_all_of_few_real_images_are_taken_in_order():
    expected = torch.stack([item["images"] for item in images().train])
    assert torch.equal(DiffusionTask(images()).training_images(), expected)


def test_real_samples_are_of_all_classes_in_turn(few):
    """However many images there are of those before."""
    found = DiffusionTask(images()).real_samples(100)
    assert ((found[:, 0, 0, 0] + 1) * 127.5 / 100).round().int().tolist() == [i % 3 for i in range(100)]
    assert torch.equal(found[:3], found[90:93])  # 30 of a class, then the first again


def test_a_class_without_validation_images_keeps_its_column():
    """Heads of columns are the classes' names: no column may move."""
    data = images(each=3)
    without = LabelledImages(data.validation.pixels[:3], data.validation.labels[:3])  # ants alone
    untold = ImageClasses(data.train, without, [*NAMES, "dog"], 1, 4)
    found = DiffusionTask(untold).real_samples(6)
    assert ((found[:, 0, 0, 0] + 1) * 127.5 / 100).round().int().tolist()[:3] == [0, 1, 2]
    assert (found[3] == 1).all() and torch.equal(found[4], data.validation[1]["images"])


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )


def dit(**changes):
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 1, "sample_size": 2}
    sizes |= {"in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 3, **changes}
    return create_dit(generator=torch.Generator().manual_seed(0), **sizes)


@pytest.mark.parametrize(
    "model, resolution, patch_size, message",
    [
        (dit(num_embeds_ada_norm=2), 8, 1, "the data have 3 classes, the model 2"),
        (dit(), 16, 1, "the model takes 4 channels of 2 pixels, the data are 4 channels of 4"),
        (dit(), 10, 1, "resolution=10 is no multiple of 4, by which the VAE makes images smaller: take 8"),
        (None, 9, 2, "patch_size=2 does not divide the 9 pixels"),
    ],
)
@pytest.mark.parametrize("load", ["load_task", "load_class_tasks"])
def test_what_does_not_fit_is_found_before_images_are_encoded(
    monkeypatch, tmp_path, load, model, resolution, patch_size, message
):
    monkeypatch.setattr(arguments, "load_images", lambda *_, **__: images(resolution=resolution))
    brought = model and PretrainedDiT(model, vae(), None, label_names(None, model.config.num_embeds_ada_norm))
    monkeypatch.setattr(arguments, "_load_dit", lambda _: brought)
    monkeypatch.setattr(diffusion_task, "cache_latents", None)
    args = Namespace(
        **{"task": "diffusion", "random_flip": False, "patch_size": patch_size, "output_dir": tmp_path},
        label_map=None,
        **{
            "base_classes": NAMES[:2],
            "novel_classes": NAMES[2:],
            "images_per_novel_class": None,
            "class_groups": None,
        },
    )
    if load == "load_class_tasks" and model is not None and model.config.num_embeds_ada_norm == 2:
        args.base_classes, args.novel_classes, message = ["cat"], ["ant"], "are no labels of the model: cat. The data"
    with pytest.raises(ValueError, match=message):
        getattr(arguments, load)(args, Accelerator(cpu=True))
