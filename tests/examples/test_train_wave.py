# SPDX-License-Identifier: Apache-2.0
"""train_wave.py on models of a few thousand parameters: that it runs and is exact, not how good its models are."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTModel, pipeline

from diffusers_learngene import Learngene
from diffusers_learngene.anatomy.dit import create_dit
from diffusers_learngene.data import image_classes as data
from diffusers_learngene.runs.tracking import create_accelerator
from diffusers_learngene.training.condensing import ElasticModel


SIZES = ("--descend_sizes", "4", "2x1", "4x2")  # the last is the first again
OVERRIDES = [{"num_layers": 4}, {"num_layers": 2, "num_attention_heads": 1}]
STARTS = ["learngene", "scratch", "selection"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def tensors(folder):
    return load_file(folder / "learngene" / "model.safetensors")


def assert_same_run(one, other):
    """The same numbers, and the same weights in everything that was made."""
    assert results(one)["rows"] == results(other)["rows"]
    files = sorted(
        path.relative_to(one) for name in ("learngene", "models") for path in one.glob(f"{name}/**/*.safe*")
    )
    assert len(files) > 3
    for file in files:
        expected = load_file(one / file)
        found = load_file(other / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), file


@pytest.fixture(scope="module")
def finished(train_wave, tmp_path_factory):
    """The folder of a whole run on the digits."""
    folder = tmp_path_factory.mktemp("finished") / "wave"
    train_wave("--output_dir", folder, *SIZES)
    return folder


def test_help_imports_nothing_heavy(train_wave):
    done = train_wave.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--elastic_depths" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "diffusers", "transformers", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--max_train_steps 0", "argument --max_train_steps: invalid positive value: '0'"),
        ("--num_layers 1", "argument --num_layers: invalid layers value: '1'"),
        ("--descend_sizes 4 8x", "argument --descend_sizes: invalid size value: '8x'"),
        ("--learning_rate nan", "argument --learning_rate: invalid rate value: 'nan'"),
        ("--scaler_train_steps 300 --descend_train_steps 200", "--scaler_train_steps 300: 0 to --descend_train_steps"),
        ("--fixed_size --elastic_depths 4 8", "--fixed_size takes no --elastic_depths"),
        ("--task segmentation", "argument --task: invalid choice: 'segmentation'"),
        ("--lr_scheduler cosinus", "argument --lr_scheduler: invalid choice: 'cosinus'"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
        ("--label_map map.json", "--label_map is of the labels of a --pretrained_model_name_or_path"),
        ("--hub_token hf_secret --report_to wandb", "--hub_token with --report_to wandb would show your token"),
        ("--pretrained facebook/DiT-XL-2-256", "unrecognized arguments: --pretrained"),  # no abbreviations
    ],
)
def test_an_impossible_argument_is_one_line(train_wave, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_wave.module.parse_args(arguments.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("usage:") is False and message in last and "hf_secret" not in last


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--dataset_name me/nothing --train_data_dir nowhere", "give one of them"),
        ("--train_data_dir nowhere", "train_data_dir='nowhere' is not a folder"),
        ("--pretrained_model_name_or_path nowhere", "'nowhere' holds neither a DiTPipeline"),
        ("--task classification --pretrained_model_name_or_path nowhere", "'nowhere' holds no image classifier"),
        ("--template_size 64", "A template of 64 x 64 is larger than the 96 x 16 weight"),
        ("--elastic_heads 2 1 --template_size 16 --num_templates 999", "cannot be independent: lower num_templates"),
        ("--report_to nothing", "report_to='nothing' is not one of"),
        ("--lr_warmup_steps -1", "lr_warmup_steps=-1 must be at least 0"),
        ("--use_ema --ema_decay 2", "ema_decay=2.0 must lie in"),
        ("--noise_weight -1", "noise_weight=-1.0 must be at least 0"),
        ("--task classification --alpha 2", "alpha=2.0 must lie in"),
        ("--patch_size 3", "patch_size=3 does not divide the 8 pixels"),
        ("--task classification --patch_size 3", "patch_size=3 does not divide the 8 pixels"),
    ],
    ids=lambda value: None if value[0] == "-" else "",
)
def test_what_cannot_be_is_found_before_training(train_wave, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Accelerator, "backward", None)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train_wave("--output_dir", "out", *arguments.split())
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_results(finished):
    found = results(finished)
    assert found["commit"] and "python" in found["command"] and found["machine"] and found["seed"] == 0
    assert {"python", "torch", "diffusers", "peft"} <= set(found["versions"])
    ancestry, *rows = found["rows"]
    assert ancestry["start"] == "ancestry" and [row["start"] for row in rows] == STARTS * len(OVERRIDES)
    sizes = ["layers=4 (never seen)", "layers=2 attention_heads=1"]
    assert [row["size"] for row in rows] == [size for size in sizes for _ in STARTS]
    for row in rows:
        assert row["frechet"] >= 0 and all(row[f"val_loss@{step}"] > 0 for step in (0, 1, 2, 4))
        assert ("frechet@0" in row) == (row["start"] == "learngene")
    parameters = [row["parameters"] for row in rows]
    assert parameters[0] == parameters[2] > ancestry["parameters"] > parameters[3] == parameters[5]


@pytest.mark.slow
def test_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("results.json", "curves.png", "samples.png", "log.jsonl", "learngene", "models", "checkpoints")
    }
    assert {path.name for path in (finished / "learngene").iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "curves.png", "samples.png")
    }
    assert {path.name for path in (finished / "models").iterdir()} == {
        *("ancestry", "layers=4", "layers=2-attention_heads=1")
    }
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["num_layers"] == 2
    logged = {key for line in lines for key in line}
    assert {"ancestry/loss", "condense/loss", "layers=4 scalers/val_loss", "layers=4 scratch/val_loss"} <= logged


@pytest.mark.slow
def test_models_are_stock_models(finished):
    for folder in (finished / "models").iterdir():
        model, loading = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
    images = torch.zeros(2, 1, 8, 8)
    assert (
        model(images, timestep=torch.tensor([1, 1]), class_labels=torch.tensor([0, 10])).sample.shape == images.shape
    )


@pytest.mark.slow
def test_the_learngene_descends(finished):
    learngene = Learngene.from_pretrained(finished / "learngene")
    assert learngene.config.ancestry is None
    assert learngene.config.condensed_for == [
        {"num_layers": depth, **heads} for heads in ({}, {"num_attention_heads": 1}) for depth in (2, 3)
    ]
    for size in (*OVERRIDES, {"num_layers": 7}):
        model = learngene.descend(**size).merge_and_unload()
        assert type(model) is DiTTransformer2DModel and model.config.num_layers == size["num_layers"]


@pytest.mark.slow
def test_the_card_tells_it_all(finished):
    card = ModelCard.load(finished / "learngene" / "README.md")
    assert card.data.library_name == "diffusers-learngene"
    for name in ("curves.png", "samples.png"):
        assert f"![{name}]({name})" in card.text and (finished / "learngene" / name).is_file()
    table = [line for line in card.text.splitlines() if line.startswith("| ")]
    header = "| size | start | parameters | val_loss@0 | val_loss@1 | val_loss@2 | val_loss@4 | frechet@0 | frechet |"
    assert table[0] == header and len(table) == 2 + len(results(finished)["rows"])
    assert all(line.count("|") == header.count("|") for line in table)
    assert "data: `scikit-learn's digits`" in card.text and "max_train_steps: `4`" in card.text
    assert str(finished) not in card.content and "/" not in str(card.data.base_model or "")


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(train_wave, finished):
    before = results(finished)
    with pytest.raises(ValueError, match="already holds checkpoint-4: resume_from_checkpoint='latest' continues it"):
        train_wave("--output_dir", finished)
    with pytest.raises(ValueError, match="other settings than seed=1"):
        train_wave("--output_dir", finished, "--seed", 1, "--resume_from_checkpoint", "latest")
    assert results(finished) == before


@pytest.fixture
def no_steps(monkeypatch):
    """Any training ends the test."""
    monkeypatch.setattr(Accelerator, "backward", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, stage, named",
    [
        ("--ancestry_train_steps 6", "ancestry", "max_train_steps=6 (there 4)"),
        ("--ancestry_learning_rate 1e-3", "ancestry", "learning_rate=[0.001] (there [0.002])"),
        ("--lr_scheduler linear", "ancestry", "lr_scheduler='linear' (there 'cosine')"),
        ("--lr_scheduler constant", "ancestry", "max_train_steps=None (there 4)"),
        ("--lr_warmup_steps 1", "ancestry", "lr_warmup_steps=1 (there 0)"),
        ("--max_grad_norm 2", "ancestry", "max_grad_norm=2.0 (there 1.0)"),
        ("--use_ema", "ancestry", "ema_decay=0.999 (there None)"),
        ("--mixed_precision bf16", "ancestry", "mixed_precision='bf16' (there 'no')"),
        ("--train_batch_size 4 --gradient_accumulation_steps 2", "ancestry", "shards=2 (there 1)"),
        ("--random_flip", "ancestry", "data.samples="),
        ("--resolution 4", "ancestry", "data.shapes.images=[1, 4, 4] (there [1, 8, 8])"),
        ("--num_layers 3", "ancestry", "model.num_layers=3 (there 2)"),
        ("--num_attention_heads 1 --attention_head_dim 16", "ancestry", "model.num_attention_heads=1 (there 2)"),
        ("--noise_weight 0.5", "condense", "task.noise_weight=0.5 (there 1.0)"),
        ("--learning_rate 2e-3", "condense", "learning_rate=[0.002, 0.005] (there [0.001, 0.005])"),
        ("--scaler_learning_rate 1e-3", "condense", "learning_rate=[0.001, 0.001] (there [0.001, 0.005])"),
        ("--elastic_depths 2 4", "condense", "sizes="),
        ("--fixed_size", "condense", "sizes=[{}]"),
        ("--max_train_steps 6", "condense", "max_train_steps=6 (there 4)"),
        ("--max_train_steps 2", "condense", "max_train_steps=2 (there 4)"),
        ("--num_templates 3", "condense", "starting_weights="),
        ("--descend_train_steps 6", "layers=4-learngene", "max_train_steps=4 (there 2)"),
        ("--scaler_train_steps 1", "layers=4-scalers", "max_train_steps=1 (there 2)"),
        ("--scaler_train_steps 0", "layers=4-learngene", "max_train_steps=4 (there 2)"),
        ("--finetune_learning_rate 1e-3", "layers=4-learngene", "learning_rate=[0.001] (there [0.0003])"),
    ],
    ids=lambda value: "",
)
def test_a_finished_run_is_not_taken_for_one_with_other_settings(
    train_wave, finished, no_steps, tmp_path, arguments, stage, named
):
    folder = tmp_path / "wave"
    shutil.copytree(finished, folder)
    with pytest.raises(ValueError) as caught:
        train_wave("--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest", *arguments.split())
    assert f"/{stage}/checkpoint-" in str(caught.value) and named in str(caught.value)
    assert str(folder / "checkpoints" / stage) in str(caught.value)  # what to delete
    assert results(folder) == results(finished)


@pytest.mark.slow
def test_stages_of_another_ancestry_are_not_taken(train_wave, finished, tmp_path):
    folder, go_on = shutil.copytree(finished, tmp_path / "wave"), ("--resume_from_checkpoint", "latest")
    shutil.rmtree(folder / "checkpoints" / "ancestry")
    arguments = ["--output_dir", folder, *SIZES, "--ancestry_learning_rate", "1e-3", *go_on]
    with pytest.raises(ValueError, match=r"condense/checkpoint-4'.* than starting_weights=.*, ancestry.weights="):
        train_wave(*arguments)
    shutil.rmtree(folder / "checkpoints" / "condense")
    with pytest.raises(ValueError, match=r"layers=4-scalers/checkpoint-2'.* than starting_weights="):
        train_wave(*arguments)
    shutil.rmtree(folder / "checkpoints")
    train_wave(*arguments)
    assert results(folder)["rows"] != results(finished)["rows"]


@pytest.mark.slow
def test_labels_of_other_images_are_other_data(train_wave, finished, digits, no_steps, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "wave")
    wrong = digits.map(lambda row: {"label": 9 - row["label"]}, load_from_cache_file=False)
    monkeypatch.setattr(data, "_digits", lambda: wrong)
    with pytest.raises(ValueError, match=r"ancestry/checkpoint-4'.* than data.digest="):
        train_wave("--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest")


@pytest.mark.slow
def test_a_run_with_more_descendants_keeps_what_it_has(train_wave, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "wave")
    train_wave("--output_dir", folder, *SIZES, "3", "--resume_from_checkpoint", "latest")
    before = results(finished)["rows"]
    assert results(folder)["rows"][: len(before)] == before and len(results(folder)["rows"]) == len(before) + 3


class PowerCut(Exception):
    """Not one of ours, and nobody catches it."""


@pytest.mark.slow
def test_resuming_is_exact(train_wave, finished, tmp_path, monkeypatch):
    backward, folder = Accelerator.backward, tmp_path / "wave"

    def run(steps):
        """Go on for that many steps; checkpoints are at every second one."""
        left = iter(range(steps))

        def until_the_power_cut(*arguments):
            if next(left, None) is None:
                raise PowerCut
            backward(*arguments)

        monkeypatch.setattr(Accelerator, "backward", until_the_power_cut)
        with pytest.raises(PowerCut):
            train_wave("--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest")

    run(3)  # inside the ancestry, which goes on at its step 3
    assert (folder / "checkpoints" / "ancestry" / "checkpoint-2").is_dir()
    run(2 + 3)  # inside the condensing
    assert (folder / "checkpoints" / "condense" / "checkpoint-2").is_dir()
    run(2 + 2 + 1)  # after the scalers of the first descendant
    assert (folder / "checkpoints" / "layers=4-scalers" / "checkpoint-2").is_dir()
    run(2 + 3)  # inside its training from scratch
    assert (folder / "checkpoints" / "layers=4-scratch" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    train_wave("--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest")
    assert_same_run(finished, folder)


@pytest.mark.slow
def test_classification(train_wave, tmp_path):
    train_wave("--task", "classification", "--output_dir", tmp_path, "--descend_sizes", "3", "4")
    assert not (tmp_path / "samples.png").exists() and (tmp_path / "curves.png").exists()
    ancestry, *rows = results(tmp_path)["rows"]
    assert 0 <= ancestry["accuracy@0"] <= 1 and [row["start"] for row in rows] == STARTS * 2
    assert all(0 <= row[f"accuracy@{step}"] <= 1 for row in rows for step in (0, 2, 4))
    assert ["never seen" in row["size"] for row in rows] == [False] * 3 + [True] * 3
    assert len(list((tmp_path / "models").iterdir())) == 3
    for folder in (tmp_path / "models").iterdir():
        model, loading = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and model.config.num_labels == 10
        stock = pipeline("image-classification", str(folder))
        assert {answer["label"] for answer in stock(np.zeros((8, 8, 1), np.uint8), top_k=10)} == set("0123456789")
    card = ModelCard.load(tmp_path / "learngene" / "README.md")
    assert "![curves.png](curves.png)" in card.text and "samples.png" not in card.text
    assert "| accuracy@0 | accuracy@4 |" in card.text
    model = Learngene.from_pretrained(tmp_path / "learngene").descend(num_hidden_layers=5)
    assert model(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 10)
    Learngene.from_pretrained(tmp_path / "learngene").save_descendant(tmp_path / "five", num_hidden_layers=5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "five").image_mean == (0.5,)


@pytest.mark.slow
def test_condensing_at_a_fixed_size(train_wave, tmp_path):
    with pytest.warns(UserWarning, match="holds no scalers for the width"):
        train_wave("--fixed_size", "--output_dir", tmp_path, "--descend_sizes", "2", "2x1")
    assert Learngene.from_pretrained(tmp_path / "learngene").config.condensed_for == [{}]
    assert "- the size of the ancestry\n" in (tmp_path / "learngene" / "README.md").read_text()
    seen = ["never seen" not in row["size"] for row in results(tmp_path)["rows"][1::3]]
    assert seen == [True, False]


@pytest.mark.slow
def test_all_that_can_be_switched_on(train_wave, tmp_path):
    switches = "--use_ema --mixed_precision bf16 --gradient_checkpointing --gradient_accumulation_steps 2"
    sizes = "--elastic_depths 2 4 --elastic_heads 2 3 --descend_sizes 4x3 --template_size 8 --num_templates 4"
    others = "--scaler_train_steps 0 --noise_weight 0.5 --random_flip --report_to tensorboard"
    for task in ("diffusion", "classification"):
        folder = tmp_path / task
        train_wave("--task", task, "--output_dir", folder, *f"{switches} {sizes} {others}".split())
        config = Learngene.from_pretrained(folder / "learngene").config
        assert len(config.widths) == 2 and len(config.condensed_for) == 4
        assert not any("never seen" in row["size"] for row in results(folder)["rows"])
        assert list((folder / "logs").rglob("events.out.tfevents*"))


def test_recomputing_blocks_changes_no_gradient():
    learngene = Learngene.condense(tiny_dit(), widths=[{"num_attention_heads": 1}])
    draws = torch.Generator().manual_seed(0)
    learngene.tensors = {key: t + 0.1 * torch.randn(t.shape, generator=draws) for key, t in learngene.tensors.items()}
    inputs = {"timestep": torch.tensor([1, 500]), "class_labels": torch.tensor([0, 5])}
    images, gradients = torch.randn(2, 4, 4, 4, generator=draws), []
    for recompute in (False, True):
        model = ElasticModel(learngene, [{"num_layers": 3}, {"num_attention_heads": 1}])
        if recompute:
            model.enable_gradient_checkpointing()
        outputs = [model(size, images, **inputs).sample for size in (0, 1, 0)]
        sum((output * (i + 1)).sum() for i, output in enumerate(outputs)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_but_can_be_pushed(train_wave, finished, hub, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "wave")
    arguments = ["--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest"]
    arguments += ["--push_to_hub", "--hub_model_id", "wave-digits", "--hub_token", "hf_secret"]
    monkeypatch.setattr("sys.argv", ["train_wave.py", *map(str, arguments)])
    monkeypatch.setattr(Accelerator, "backward", None)
    train_wave(*arguments)
    assert_same_run(finished, folder)

    files = hub.files("me/wave-digits")
    assert set(files) == {
        ".gitattributes",
        "model.safetensors",
        "config.json",
        "README.md",
        "curves.png",
        "samples.png",
    }
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers-learngene" and "learngene" in card.data.tags
    assert 'Learngene.from_pretrained("me/wave-digits"' in card.text and "| learngene |" in card.text
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card.text)) == {"curves.png", "samples.png"}
    for text in (files["README.md"], files["config.json"]):
        assert str(tmp_path).encode() not in text
    for name in ("results.json", "log.jsonl"):
        assert "hf_secret" not in (folder / name).read_text()
    assert "--hub_token ..." in results(folder)["command"]

    pushed = Learngene.from_pretrained("me/wave-digits")
    with hub.down():
        offline = Learngene.from_pretrained("me/wave-digits", local_files_only=True)
    for name, tensor in tensors(finished).items():
        assert torch.equal(pushed.tensors[name], tensor) and torch.equal(offline.tensors[name], tensor)


def test_a_wrong_repository_is_found_before_training(train_wave, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "backward", None)
    with pytest.raises(Exception, match="not a repository"):
        train_wave("--output_dir", tmp_path, "--push_to_hub", "--hub_model_id", "not a repository")


# ------------------------------------------------------------------------------------------------ pretrained models


def tiny_dit(**config):
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 4}
    config = {**sizes, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 5, **config}
    return create_dit(generator=torch.Generator().manual_seed(0), **config)


LABELS = {0: "tench, Tinca tinca", 1: "Class-2, the second", 2: "hen", 3: "class-0", 4: "class-1"}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A `DiTPipeline` as on the Hub: latents of half the size, learned variances, more classes than the data, and in
    another order."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
    )
    pipe = DiTPipeline(tiny_dit(), vae, DDIMScheduler(beta_end=0.03, prediction_type="v_prediction"))
    pipe.register_to_config(id2label=LABELS)  # which stock `save_pretrained` leaves out
    pipe.save_pretrained(folder)
    return folder


def labels_seen(run):
    """The labels that any DiT is asked for."""
    seen, forward = set(), DiTTransformer2DModel.forward

    def watched(self, *args, class_labels=None, **kwargs):
        seen.update(class_labels.flatten().tolist())
        return forward(self, *args, class_labels=class_labels, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTTransformer2DModel, "forward", watched)
        run()
    return seen


@pytest.mark.slow
def test_a_pipeline_and_own_images(train_wave, pipeline_folder, image_folder, tmp_path):
    arguments = ["--pretrained_model_name_or_path", pipeline_folder, "--train_data_dir", image_folder]
    seen = labels_seen(lambda: train_wave(*arguments, "--output_dir", tmp_path, "--descend_sizes", "3"))
    assert seen == {3, 4, 1, 5}  # classes 0, 1 and 2, and the null class
    assert {path.name for path in (tmp_path / "latents").iterdir()} == {"train.safetensors", "validation.safetensors"}
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"layers=3"}
    assert not (tmp_path / "checkpoints" / "ancestry").exists()
    assert [row["start"] for row in results(tmp_path)["rows"]] == ["ancestry", *STARTS]
    text = (tmp_path / "learngene" / "README.md").read_text()
    assert "a trained ancestry model" in text and "data: `own images`" in text
    assert not any(str(folder) in text for folder in (pipeline_folder, image_folder, tmp_path))

    whole = DiffusionPipeline.from_pretrained(tmp_path / "models" / "layers=3")
    assert whole.transformer.config.num_layers == 3 and whole.scheduler.config.beta_end == 0.03
    assert whole.get_label_ids(["Tinca tinca", "class-0"]) == [0, 3]
    images = whole([0, 4], guidance_scale=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    companions = Learngene.from_pretrained(tmp_path / "learngene").config.companions
    assert companions.id2label == {str(key): name for key, name in LABELS.items()}
    assert companions.pipeline == {"class": "DiTPipeline", "component": "transformer"}


@pytest.mark.slow
def test_a_transformer_and_a_classifier(train_wave, tmp_path):
    tiny_dit(in_channels=1, out_channels=1, sample_size=8, num_embeds_ada_norm=10).half().save_pretrained(
        tmp_path / "dit"
    )
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config |= {"image_size": 8, "patch_size": 2, "num_channels": 1}
    ViTForImageClassification(ViTConfig(**config, num_labels=10)).half().save_pretrained(tmp_path / "vit")
    for name, task in (("dit", "diffusion"), ("vit", "classification")):
        arguments = ["--task", task, "--pretrained_model_name_or_path", tmp_path / name, "--descend_sizes", "3"]
        found = train_wave(*arguments, "--output_dir", tmp_path / task)
        assert [row["start"] for row in found["rows"]] == ["ancestry", *STARTS]
        assert {tensor.dtype for tensor in tensors(tmp_path / task).values()} == {torch.float32}


def test_a_model_that_does_not_fit_is_refused(train_wave, pipeline_folder, image_folder, tmp_path):
    tiny_dit(in_channels=3, out_channels=3, sample_size=8).save_pretrained(tmp_path / "colour")
    tiny_dit(in_channels=1, out_channels=1, sample_size=8).save_pretrained(tmp_path / "five-classes")
    shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    (shutil.copytree(pipeline_folder, tmp_path / "no-vae") / "vae" / "config.json").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    ViTForImageClassification(ViTConfig(**sizes, num_channels=1, num_labels=3)).save_pretrained(tmp_path / "vit")
    ViTModel(ViTConfig(**sizes, num_channels=1)).save_pretrained(tmp_path / "headless")

    def refusal(name, *arguments):
        with pytest.raises(ValueError) as caught:
            train_wave(
                "--output_dir", tmp_path / "out", "--pretrained_model_name_or_path", tmp_path / name, *arguments
            )
        assert not (tmp_path / "out" / "checkpoints").exists()
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "takes 3 channels of 8 pixels, the data are 1 channels of 8" in refusal("colour")
    assert "the data have 10 classes, the model 5" in refusal("five-classes")
    tiny_dit(in_channels=1, out_channels=1, sample_size=8).save_pretrained(tmp_path / "unnamed")
    own = ("--train_data_dir", str(image_folder))
    assert "3 of 3 classes of the data are no labels of the model: class-0, class-1, class-2" in refusal(
        "unnamed", *own
    )
    (tmp_path / "map.json").write_text('{"class-0": 5}')
    wrong = ("--label_map", str(tmp_path / "map.json"))
    assert "{'class-0': 5} are no labels of the model, which has 5" in refusal("unnamed", *own, *wrong)
    assert "holds neither a DiTPipeline nor a DiTTransformer2DModel: " in refusal("no-vae")
    assert "is no DiTTransformer2DModel: it lacks" in refusal("vae")
    assert "holds neither" in refusal("vit")
    classify = ("--task", "classification")
    assert "7 of 10 classes of the data are no labels of the model: 3, 4, 5" in refusal("vit", *classify)
    assert "is no trained classifier: it lacks ['classifier.bias', 'classifier.weight']" in refusal(
        "headless", *classify
    )
    assert "holds no image classifier" in refusal("colour", *classify)


# -------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("launched", [True, False])
def test_accelerate_launch_may_use_all_cores(launched, monkeypatch, tmp_path):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        create_accelerator("run", output_dir=tmp_path)
        assert torch.get_num_threads() == (len(os.sched_getaffinity(0)) if launched else 1)
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_accelerate_launch(train_wave, tmp_path):
    """As the README has it, on all digits and all cores."""
    done = train_wave.launch(
        "accelerate.commands.launch",
        *train_wave.tiny,
        "--descend_sizes",
        "3",
        "--output_dir",
        tmp_path,
        OMP_NUM_THREADS=None,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layers=3" in done.stdout and "val_loss@4" in done.stdout
    assert (
        results(tmp_path)["command"].startswith("python ")
        and "train_wave.py --num_layers 2" in results(tmp_path)["command"]
    )
    Learngene.from_pretrained(tmp_path / "learngene").descend(num_layers=3)


@pytest.mark.slow
def test_two_processes_condense_as_one(train_wave, pipeline_folder, image_folder, tmp_path):
    arguments = [*train_wave.tiny, "--pretrained_model_name_or_path", pipeline_folder, "--descend_sizes", "3"]
    arguments += ["--train_data_dir", image_folder]
    done = train_wave.launch(
        "torch.distributed.run --standalone --nproc_per_node 2",
        *[*arguments, "--output_dir", tmp_path / "two"],
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("val_loss@4") == 1
    train_wave(*arguments, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
    for expected, found in zip(results(tmp_path / "one")["rows"], results(tmp_path / "two")["rows"], strict=True):
        assert found["val_loss@4" if "val_loss@4" in found else "val_loss@0"] == pytest.approx(
            expected["val_loss@4" if "val_loss@4" in found else "val_loss@0"], abs=1e-3
        )
