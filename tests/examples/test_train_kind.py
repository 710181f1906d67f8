# SPDX-License-Identifier: Apache-2.0
"""train_kind.py on models of a few thousand parameters: that it runs and is exact, not how good its models are."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_learngene import Learngene
from diffusers_learngene.anatomy.dit import create_dit


RATES = ("--learning_rate", "0.05", "--tailor_learning_rate", "0.1")  # so that a few steps do something
WAYS = ["kind", "lora", "pissa", "oft", "full", "scratch"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    return {row["way"]: row for row in results(folder)["rows"]}


def models(folder):
    return {row["model"]: row for row in results(folder)["models"]}


@pytest.fixture(scope="module")
def finished(train_kind, tmp_path_factory):
    """The folder of a whole run on the digits."""
    folder = tmp_path_factory.mktemp("finished") / "kind"
    train_kind(*RATES, "--output_dir", folder)
    return folder


def test_help_imports_nothing_heavy(train_kind):
    done = train_kind.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--novel_classes" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "diffusers", "transformers", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--num_learngene 0", "argument --num_learngene: invalid positive value: '0'"),
        ("--seeds one", "argument --seeds: invalid seed value: 'one'"),
        ("--seeds 0 -1", "argument --seeds: invalid seed value: '-1'"),
        ("--seed -1", "argument --seed: invalid seed value: '-1'"),
        ("--label_init zero", "argument --label_init: invalid choice: 'zero'"),
        ("--task classification", "unrecognized arguments: --task classification"),
        ("--oft_learning_rate -1", "argument --oft_learning_rate: invalid rate value: '-1'"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
    ],
)
def test_an_impossible_argument_is_one_line(train_kind, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_kind.module.parse_args(arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--base_classes 0 1 2 --novel_classes 2 3", "['2'] are base classes and novel classes"),
        ("--base_classes 0 1 eleven", "base_classes: ['eleven'] are no classes of the data"),
        ("--novel_classes 3 3", "novel_classes: ['3'] are there twice"),
        ("--base_classes 0 1 2 3 4 5 6 7 8 9", "novel_classes are none of the 10 classes"),
        ("--class_groups nowhere.json", "class_groups='nowhere.json' cannot be read"),
        ("--class_groups text.json", "class_groups='text.json' cannot be read"),
        ("--class_groups number.json", "class_groups='number.json' must hold lists of classes"),
        ("--class_groups novel.json", "['7'] are no classes of the data"),
        ("--class_groups part.json", "class_groups='part.json': ['4', '5', '6'] are in no group"),
        ("--num_learngene 999", "999"),
        ("--train_data_dir nowhere", "train_data_dir='nowhere' is not a folder"),
        ("--pretrained_model_name_or_path nowhere", "'nowhere' holds neither a DiTPipeline"),
        ("--patch_size 3", "patch_size=3 does not divide the 8 pixels"),
    ],
    ids=lambda value: None if value[0] == "-" else "",
)
def test_what_cannot_be_is_found_before_training(train_kind, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Accelerator, "backward", None)
    (tmp_path / "text.json").write_text("not JSON")
    (tmp_path / "number.json").write_text("[0, 1]")
    (tmp_path / "novel.json").write_text('[["0", "1", "2", "3", "4", "5", "6", "7"]]')
    (tmp_path / "part.json").write_text('{"small": [0, 1], "large": ["2", "3"]}')
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train_kind("--output_dir", "out", *arguments.split())
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_results(finished):
    found = rows(finished)
    assert list(found) == ["training images", *WAYS]
    budget = found["kind"]["trainable"]
    for way in WAYS:
        assert found[way]["frechet"] >= 0 and all(found[way][f"val_loss@{step}"] > 0 for step in (0, 1, 2, 4))
    for way in ("lora", "pissa", "oft"):
        assert 2 / 3 < found[way]["trainable"] / budget < 3 / 2
    assert found["full"]["trainable"] == found["full"]["parameters"] == found["lora"]["parameters"]


@pytest.mark.slow
def test_base_classes_are_kept_exactly(finished):
    found = rows(finished)
    assert found["kind"]["base_after"] == pytest.approx(found["kind"]["base_before"], abs=1e-6)
    for way in ("lora", "pissa", "oft", "full"):
        assert abs(found[way]["base_after"] - found[way]["base_before"]) > 1e-4


@pytest.mark.slow
def test_a_smaller_model_knows_its_classes_as_well(finished):
    found = models(finished)
    whole, base, novel = (found[f"KIND, {name}"] for name in ("all classes", "base classes", "novel classes"))
    one, merged = found["KIND, class 0"], found["KIND, class 0, merged"]
    assert base["base_val_loss"] == pytest.approx(whole["base_val_loss"], abs=1e-5)
    assert novel["novel_val_loss"] == pytest.approx(whole["novel_val_loss"], abs=1e-5)
    for part in (base, one, merged):
        assert part["class_val_loss"] == pytest.approx(whole["class_val_loss"], abs=1e-5)
    for key in ("parameters", "MFLOPs"):
        assert found["KIND, no class"][key] < one[key] < base[key] < whole[key]
    assert one["MFLOPs"] < merged["MFLOPs"] == found["plain DiT"]["MFLOPs"]


@pytest.mark.slow
def test_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("results.json", "curves.png", "samples.png", "tailors.png", "log.jsonl", "learngene", "models"),
        "checkpoints",
    }
    assert {path.name for path in (finished / "models").iterdir()} == {
        *("plain-DiT", "lora", "pissa", "oft", "full", "class-0")
    }
    for folder in (finished / "models").iterdir():
        model, loading = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        label = torch.tensor([model.config.num_embeds_ada_norm])
        assert model(torch.zeros(1, 1, 8, 8), timestep=label, class_labels=label).sample.isfinite().all()
    card = ModelCard.load(finished / "learngene" / "README.md")
    names = Learngene.from_pretrained(finished / "learngene").config.companions.id2label
    assert names == {str(label): str(label) for label in range(10)}  # base classes, then novel ones
    assert "kind" in card.data.tags and "| way | trainable | val_loss@0 |" in card.text
    assert "tailor_learning_rate: `0.1`" in card.text and str(finished) not in card.content


@pytest.mark.slow
def test_the_learngene_descends(finished):
    learngene = Learngene.from_pretrained(finished / "learngene")
    assert learngene.config.method == "kind" and len(learngene.config.class_tailors) == 10
    merged = learngene.descend(classes=[0]).merge_and_unload().eval()
    saved = DiTTransformer2DModel.from_pretrained(finished / "models" / "class-0").eval()
    inputs = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([0])}
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(saved(image, **inputs).sample, merged(image, **inputs).sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, stage, named",
    [
        ("--base_classes 0 1 2 3 4 6 5", "pretrain-KIND", "data.digest="),
        ("--class_groups groups.json", "pretrain-KIND", "starting_weights="),
        ("--max_train_steps 6", "pretrain-KIND", "max_train_steps=6 (there 4)"),
        ("--label_init null", "adapt-kind", "starting_weights="),
        ("--images_per_novel_class 4", "adapt-kind", "data.samples="),
        ("--sigma_learning_rate 0.2", "adapt-kind", "learning_rate=[0.1, 0.2] (there [0.1, 0.01])"),
        ("--adapt_train_steps 6", "adapt-kind", "max_train_steps=6 (there 4)"),
        ("--oft_learning_rate 0.5", "adapt-oft", "learning_rate=[0.5] (there [0.002])"),
    ],
    ids=lambda value: "",
)
def test_a_finished_run_is_not_taken_for_one_with_other_settings(
    train_kind, finished, tmp_path, monkeypatch, arguments, stage, named
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Accelerator, "backward", None)
    # As many groups as there are classes, so that all weights have the same shapes.
    (tmp_path / "groups.json").write_text("[[0, 1], [1], [2], [3], [4], [5], [6]]")
    folder = shutil.copytree(finished, tmp_path / "kind")
    with pytest.raises(ValueError) as caught:
        train_kind(*RATES, "--output_dir", folder, "--resume_from_checkpoint", "latest", *arguments.split())
    assert f"/{stage}/checkpoint-" in str(caught.value) and named in str(caught.value)
    assert results(folder) == results(finished)


class PowerCut(Exception):
    """Not one of ours, and nobody catches it."""


@pytest.mark.slow
def test_resuming_is_exact(train_kind, finished, tmp_path, monkeypatch):
    backward, folder = Accelerator.backward, tmp_path / "kind"
    arguments = [*RATES, "--output_dir", folder, "--resume_from_checkpoint", "latest"]

    def run(steps):
        """Go on for that many steps; checkpoints are at every second one."""
        left = iter(range(steps))

        def until_the_power_cut(*arguments):
            if next(left, None) is None:
                raise PowerCut
            backward(*arguments)

        monkeypatch.setattr(Accelerator, "backward", until_the_power_cut)
        with pytest.raises(PowerCut):
            train_kind(*arguments)

    run(3)
    assert (folder / "checkpoints" / "pretrain-KIND" / "checkpoint-2").is_dir()
    run(2 + 4 + 3)
    assert (folder / "checkpoints" / "adapt-kind" / "checkpoint-2").is_dir()
    run(2 + 3)
    assert (folder / "checkpoints" / "adapt-lora" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    train_kind(*arguments)
    assert results(folder)["rows"] == results(finished)["rows"]
    assert results(folder)["models"] == results(finished)["models"]
    for file in (
        "learngene/model.safetensors",
        *(f"models/{way}/diffusion_pytorch_model.safetensors" for way in ("lora", "oft")),
    ):
        one, other = load_file(finished / file), load_file(folder / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_several_seeds_groups_and_few_shots(train_kind, tmp_path):
    (tmp_path / "groups.json").write_text('{"round": ["0", 6], "straight": ["1"]}')
    arguments = ["--base_classes", "0", "6", "1", "--novel_classes", "8", "--class_groups", tmp_path / "groups.json"]
    arguments += [
        "--images_per_novel_class",
        "5",
        "--use_ema",
        "--gradient_checkpointing",
        "--mixed_precision",
        "bf16",
    ]
    train_kind(*arguments, "--seeds", 3, 4, "--output_dir", tmp_path / "out")
    whole = results(tmp_path / "out")
    assert whole["seeds"] == [3, 4] and len(whole["runs"]) == 2
    kind = next(row for row in whole["rows"] if row["way"] == "kind")
    each = [next(row for row in run["rows"] if row["way"] == "kind") for run in whole["runs"]]
    mean = sum(row["val_loss@4"] for row in each) / 2
    assert kind["val_loss@4"].startswith(f"{mean:.3f} ± ")
    learngene = Learngene.from_pretrained(tmp_path / "out" / "learngene")
    assert learngene.config.class_tailors[:3] == [[0], [0], [1]]


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_but_can_be_pushed(train_kind, finished, hub, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "kind")
    arguments = [*RATES, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    monkeypatch.setattr(Accelerator, "backward", None)
    train_kind(*arguments, "--push_to_hub", "--hub_model_id", "kind-digits", "--hub_token", "hf_secret")
    assert results(folder)["rows"] == results(finished)["rows"]
    assert "hf_secret" not in (folder / "log.jsonl").read_text()
    pushed = Learngene.from_pretrained("me/kind-digits")
    expected = load_file(finished / "learngene" / "model.safetensors")
    assert all(torch.equal(pushed.tensors[name], tensor) for name, tensor in expected.items())


# ------------------------------------------------------------------------------------------------ pretrained models


@pytest.mark.slow
def test_a_pretrained_model_and_own_images(train_kind, image_folder, tmp_path):
    """Of its five classes the data have three, two of them base classes."""
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 8}
    dit = create_dit(
        generator=torch.Generator().manual_seed(0),
        **sizes,
        in_channels=1,
        out_channels=2,  # learned variances
        num_embeds_ada_norm=5,
    )
    dit.save_pretrained(tmp_path / "dit")
    arguments = ["--pretrained_model_name_or_path", tmp_path / "dit", "--train_data_dir", image_folder]
    (tmp_path / "map.json").write_text('{"class-2": 0, "class-0": 4}')  # the novel class is none of its labels
    arguments += ["--label_map", tmp_path / "map.json"]
    train_kind(*arguments, "--novel_classes", "class-1", "--output_dir", tmp_path / "out")
    found = models(tmp_path / "out")
    assert found["plain DiT, as loaded"]["base_val_loss"] > 0 and found["KIND, as cut from it"]["base_val_loss"] > 0
    assert list(rows(tmp_path / "out"))[1:] == WAYS
    learngene = Learngene.from_pretrained(tmp_path / "out" / "learngene")
    assert learngene.config.base_config["num_embeds_ada_norm"] == 3
