# SPDX-License-Identifier: Apache-2.0
"""What lies beside a trained model decides how it is trained on: its schedule, its labels, its image processor."""

import json
import logging
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from diffusers_learngene.anatomy.dit import create_dit, label_table
from diffusers_learngene.data.image_classes import load_image_classes
from diffusers_learngene.training.arguments import load_class_tasks, load_task
from diffusers_learngene.training.classification_task import ClassificationTask
from diffusers_learngene.training.pretrained import load_classifier, load_dit, load_image_processor


NAMES = ["light", "dark"]  # a model's order; folders are sorted: dark, light
SHADES = {"light": (250, 200, 190), "dark": (5, 40, 20)}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two classes of ten colour images, 12 x 8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for name, shade in SHADES.items():
        (folder / name).mkdir()
        for i in range(10):
            pixels = (draws.normal(0, 3, (8, 12, 3)) + shade).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def arguments(folder, output_dir, **changes):
    data = {"dataset_name": None, "dataset_config_name": None, "train_data_dir": str(folder), "resolution": None}
    data |= {
        "image_column": "image",
        "label_column": "label",
        "center_crop": True,
        "broken_images": "error",
        "seed": 0,
    }
    model = {"pretrained_model_name_or_path": None, "revision": None, "variant": None, "label_map": None}
    task = {"task": "classification", "random_flip": False, "alpha": 0.5, "tau": 1.0, "noise_weight": 1.0}
    task |= {"num_inference_steps": 2, "guidance_scale": 1.5, "output_dir": str(output_dir)}
    return Namespace(**{**data, **model, **task, **changes})


# ------------------------------------------------------------------------------------------------------------- DiT


def pipeline(folder, scheduler, id2label=None, **config):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    )
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 4}
    dit = create_dit(generator=torch.Generator().manual_seed(0), **sizes, out_channels=8, num_embeds_ada_norm=4)
    pipe = DiTPipeline(dit, vae, scheduler)
    if id2label:
        pipe.register_to_config(id2label=id2label)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_schedule_is_the_pipelines(tmp_path, kind, prediction):
    own = kind(beta_start=0.001, beta_end=0.03, beta_schedule="scaled_linear", prediction_type=prediction)
    found = load_dit(pipeline(tmp_path, own)).scheduler
    torch.testing.assert_close(found.betas, own.betas)
    assert found.config.prediction_type == prediction and found.config.num_train_timesteps == 1000


def test_another_kind_of_noise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler .* adds no noise that is trained for here"):
        load_dit(pipeline(tmp_path / "flow", FlowMatchEulerDiscreteScheduler()))
    folder = pipeline(tmp_path / "other", DDIMScheduler())
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "flow_prediction"}))
    with pytest.raises(ValueError, match="prediction_type='flow_prediction'"):
        load_dit(folder)


def test_a_pipeline_decides_on_labels_size_and_noise(tmp_path, image_folder):
    names = {0: "cat", 1: "light", 2: "Dark, shadow", 3: "dog"}
    folder = pipeline(tmp_path / "pipe", DDIMScheduler(beta_end=0.03), names, scaling_factor=0.5, shift_factor=0.1)
    args = arguments(image_folder, tmp_path, task="diffusion", pretrained_model_name_or_path=folder)
    task, model = load_task(args, Accelerator(cpu=True))
    assert task.data.resolution == 8 and task.shape == (4, 4, 4)  # 12 x 8 images are cropped to what it makes
    assert task.labels == [2, 1] and task.class_names == ["Dark, shadow", "light"] and task.num_classes == 4
    assert task.sample_labels(3).tolist() == [2, 1, 2]
    assert {item["labels"] for item in task.train_data} == set(task.bank.labels.tolist()) == {1, 2}
    means = {item["labels"]: item["images"].mean().item() for item in task.data.train}
    assert means[1] > 0.3 and means[2] < -0.3  # light is light
    assert task.scheduler.betas[-1] == pytest.approx(0.03)
    real = task.real_samples(2).mean((1, 2, 3))
    assert real[0] < 0 < real[1]


def test_base_classes_keep_the_label_rows_of_their_names(tmp_path, image_folder):
    """KIND's: a base class is a label of the model by name, a novel class need not be one."""
    names = {0: "cat", 1: "lamp", 2: "Dark, shadow", 3: "dog"}
    folder = pipeline(tmp_path / "pipe", DDIMScheduler(), names)
    classes = {"base_classes": ["dark"], "novel_classes": ["light"], "images_per_novel_class": None}
    args = arguments(image_folder, tmp_path, pretrained_model_name_or_path=folder, class_groups=None, **classes)
    base, novel, model, _ = load_class_tasks(args, Accelerator(cpu=True))
    assert model.config.num_embeds_ada_norm == 1 and base.class_names == ["dark"] and novel.class_names == ["light"]
    own = load_dit(folder).transformer
    rows, all_rows = (dit.get_parameter(f"{label_table(dit)}.weight") for dit in (model, own))
    assert torch.equal(rows, all_rows[[2, -1]])
    assert base.scheduler.config == novel.scheduler.config and base.data.resolution == 8
    args.base_classes, args.novel_classes = ["light"], ["dark"]
    with pytest.raises(ValueError, match="1 of 1 classes of the data are no labels of the model: light"):
        load_class_tasks(args, Accelerator(cpu=True))
    args.label_map = str(tmp_path / "map.json")
    (tmp_path / "map.json").write_text('{"light": 1}')
    args.output_dir = str(tmp_path / "other")
    _, _, model, _ = load_class_tasks(args, Accelerator(cpu=True))
    assert torch.equal(model.get_parameter(f"{label_table(model)}.weight"), all_rows[[1, -1]])


def test_a_bare_dit_says_what_it_lacks(tmp_path, caplog):
    folder = pipeline(tmp_path, DDIMScheduler())
    with caplog.at_level(logging.WARNING):
        bare = load_dit(folder + "/transformer")
    assert "is a bare DiT, with no scheduler and no names of its labels" in caplog.text
    assert bare.scheduler is bare.vae is None and bare.labels == [f"LABEL_{i}" for i in range(4)]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_dit(folder).labels == bare.labels
    assert "has no id2label" in caplog.text


# ------------------------------------------------------------------------------------------------------ classifiers

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PROCESSORS = {
    "vit": ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD, resample=0),
    "deit": DeiTImageProcessor(size={"height": 10, "width": 10}, crop_size={"height": 8, "width": 8}),
    "clip": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=MEAN),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 8}, crop_pct=0.8),
    "flipped": MobileViTImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    "raw": ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False),
}


def vit(**changes):
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 8, "patch_size": 4, "id2label": dict(enumerate(NAMES))}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{**config, **changes})).eval()


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_what_the_models_processor_makes(name, tmp_path, image_folder):
    vit().save_pretrained(tmp_path)
    PROCESSORS[name].save_pretrained(tmp_path)
    args = arguments(image_folder, tmp_path, pretrained_model_name_or_path=str(tmp_path))
    task, _ = load_task(args, Accelerator(cpu=True))
    expected = []
    for file in sorted(image_folder.rglob("*.png")):
        pixels = PROCESSORS[name](images=Image.open(file), return_tensors="pt")["pixel_values"][0]
        expected.append((NAMES.index(file.parent.name), pixels.float()))
    found = [(item["labels"], item["images"]) for item in (*task.data.train, *task.data.validation)]
    assert len(found) == len(expected)
    for label, image in found:
        assert any(label == other and torch.allclose(image, pixels) for other, pixels in expected)


def test_a_brought_classifier_is_as_good_as_it_was(tmp_path, image_folder):
    """Trained on its own preprocessing, labels in another order than the folders'."""
    model, processor = vit(), PROCESSORS["vit"]
    files = [(Image.open(file), NAMES.index(file.parent.name)) for file in sorted(image_folder.rglob("*.png"))]
    pixels = processor(images=[image for image, _ in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([label for _, label in files])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        torch.nn.functional.cross_entropy(model(pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    args = arguments(image_folder, tmp_path, pretrained_model_name_or_path=str(tmp_path))
    task, brought = load_task(args, Accelerator(cpu=True))
    assert task.class_names == NAMES
    with torch.no_grad():
        assert (model(pixels).logits.argmax(-1) == labels).all()
    assert task.evaluate(brought.eval())["accuracy"] == 1


def test_gray_images_for_a_model_of_colour(tmp_path, image_folder):
    for file in (tmp_path / "gray" / name / f"{i}.png" for name in NAMES for i in range(4)):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(image_folder / file.parent.name / file.name).convert("L").save(file)
    vit().save_pretrained(tmp_path / "model")
    args = arguments(tmp_path / "gray", tmp_path, pretrained_model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="12 x 8 pixels: give one"):  # without a processor nothing says what to do
        load_task(args, Accelerator(cpu=True))
    PROCESSORS["vit"].save_pretrained(tmp_path / "model")
    task, _ = load_task(args, Accelerator(cpu=True))
    assert task.data.channels == 3
    one = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    vit(num_channels=1).save_pretrained(tmp_path / "model")
    one.save_pretrained(tmp_path / "model")
    args.train_data_dir = str(image_folder)
    task, _ = load_task(args, Accelerator(cpu=True))
    assert task.data.train[0]["images"].shape == (1, 8, 8)


def test_what_a_processor_cannot_do_is_said(tmp_path, image_folder):
    def refused(message, processor, model=None, **changes):
        (model or vit()).save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        args = arguments(image_folder, tmp_path, pretrained_model_name_or_path=str(tmp_path), **changes)
        with pytest.raises(ValueError, match=message):
            load_task(args, Accelerator(cpu=True))

    refused("resolution=12: the model's image processor makes images of 8", PROCESSORS["vit"], resolution=12)
    refused(r"shapes \[\(3, 8, 12\)\] .* not squares", ViTImageProcessor(do_resize=False))
    refused("cannot take images of 1 channels", PROCESSORS["vit"], vit(num_channels=1))
    refused(
        "the model takes 3 channels of 16 pixels; the data have 3 channels of 8", PROCESSORS["vit"], vit(image_size=16)
    )


def test_code_beside_a_processor_is_never_run(tmp_path):
    vit().save_pretrained(tmp_path)
    PROCESSORS["vit"].save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    own = json.loads(file.read_text()) | {"auto_map": {"AutoImageProcessor": "code.Processor"}}
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    file.write_text(json.dumps(own))
    assert load_image_processor(str(tmp_path)).image_mean == tuple(MEAN)  # transformers' own class of that name
    file.write_text(json.dumps(own | {"image_processor_type": "Nothing"}))
    with pytest.raises(ValueError, match="has an image processor that cannot be used: .* contains custom code"):
        load_image_processor(str(tmp_path))


def test_no_processor_is_said(tmp_path, caplog):
    vit().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_image_processor(str(tmp_path)) is None
    assert "has no image processor (preprocessor_config.json): images are cropped, resized and scaled" in caplog.text


@pytest.mark.parametrize(
    "model",
    [
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], id2label=dict(enumerate(NAMES)))
        ),
        ConvNextForImageClassification(
            ConvNextConfig(
                hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=8, id2label=dict(enumerate(NAMES))
            )
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_convolutional_classifiers(model, tmp_path, image_folder):
    model.eval().save_pretrained(tmp_path)
    PROCESSORS["convnext"].save_pretrained(tmp_path)
    args = arguments(image_folder, tmp_path, pretrained_model_name_or_path=str(tmp_path))
    task, brought = load_task(args, Accelerator(cpu=True))
    assert task.evaluate(brought.eval())["val_loss"] > 0


def test_a_task_refuses_classes_in_another_order(tmp_path, image_folder):
    vit().save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path))
    task = ClassificationTask(load_image_classes(train_data_dir=str(image_folder), resolution=8))
    with pytest.raises(ValueError, match=r"\['dark', 'light'\] of the data are the labels \[1, 0\] of the model"):
        task.check_model(model)
    for names in (["dark", "light"], ["LABEL_0", "LABEL_1"], ["Dark, shadow", "light"]):
        task.check_model(vit(id2label=dict(enumerate(names))))
    with pytest.raises(ValueError, match="the model has 3 labels; the data have 2 classes"):
        task.check_model(vit(id2label=dict(enumerate("abc"))))
    with pytest.raises(ValueError, match="are no labels of the model"):
        task.check_model(vit(id2label=dict(enumerate("ab"))))
