# SPDX-License-Identifier: Apache-2.0
"""train_gtl.py at its tiniest: that it runs, resumes exactly and says what cannot be, not how good it is."""

import json
import re

import pytest
import torch

from diffusers_learngene import Circuit


@pytest.fixture(scope="module")
def finished(train_gtl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "gtl"
    train_gtl("--output_dir", folder)
    return folder


def test_help_imports_nothing_heavy(train_gtl):
    done = train_gtl.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--life_steps" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "diffusers", "transformers", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--budget 1.5", "argument --budget: invalid share value: '1.5'"),
        ("--life_steps 0", "argument --life_steps: invalid positive value: '0'"),
        ("--selection best", "argument --selection: invalid choice: 'best'"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
    ],
)
def test_an_impossible_argument_is_one_line(train_gtl, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_gtl.module.parse_args(arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--architecture vgg16", "architecture='vgg16' is not one of"),
        ("--population_size 5", "population_size=5 must be a multiple"),
        ("--num_shots 20", "fewer than the 20 to train on"),
        ("--test_ways 21", "--test_ways 21 --num_shots 4 --validation_shots 4 are too many for the 20 novel classes"),
        ("--novel_classes A B C --test_ways 4", "are too many for the 3 novel classes: ways=4 must lie between 2 and"),
        ("--critic_classes A", "critic_classes are 1 of the 100"),
    ],
)
def test_what_cannot_be_is_found_before_training(train_gtl, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_gtl("--output_dir", tmp_path / "out", *arguments.split())


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    assert found["commit"] and "python" in found["command"] and found["settings"]["seed"] == 0
    assert [row["start"] for row in found["rows"]] == ["descendant", "scratch", "random", "magnitude", "full"]
    assert all(list(row) == ["start", "centroid", "0", "2", "end"] for row in found["rows"])
    assert len(found["history"]) == 3 and found["findings"]
    circuit = Circuit.from_pretrained(finished / "circuit")
    assert circuit.config.num_parameters == found["winner"]["parameters"]
    assert circuit.config.budget == found["winner"]["parameters"] / found["winner"]["host_parameters"]
    assert {path.name for path in finished.iterdir()} == {
        *(
            "results.json",
            "lineage.json",
            "fitness.png",
            "lead.png",
            "lineage.png",
            "log.jsonl",
            "circuit",
            "checkpoints",
        )
    }
    assert str(finished) not in (finished / "circuit" / "config.json").read_text()


def test_resuming_is_exact(train_gtl, finished, tmp_path):
    train_gtl("--output_dir", tmp_path, "--num_generations", 1)
    train_gtl("--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path))
    assert one["accuracy"] == other["accuracy"] and one["history"] == other["history"]
    circuits = [Circuit.from_pretrained(folder / "circuit").tensors for folder in (finished, tmp_path)]
    assert all(torch.equal(tensor, circuits[1][name]) for name, tensor in circuits[0].items())


@pytest.mark.parametrize("flags", ["--no_mutation", "--selection random", "--inherit structure", "--fill random"])
def test_ablations_run(train_gtl, tmp_path, flags):
    assert train_gtl("--output_dir", tmp_path, "--num_generations", 1, *flags.split())["rows"]


def test_images_of_ones_own(train_gtl, digits, tmp_path):
    for label in range(6):
        (tmp_path / "images" / f"class-{label}").mkdir(parents=True)
        for index, row in enumerate([row for row in digits if row["label"] == label][:12]):
            row["image"].save(tmp_path / "images" / f"class-{label}" / f"{index}.png")
    found = train_gtl(
        *("--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "out", "--resolution", 8),
        *("--num_ways", 2, "--test_ways", 2, "--base_classes", "class-0", "class-1"),
        *("--critic_classes", "class-2", "class-3", "--novel_classes", "class-4", "class-5"),
    )
    assert found["classes"] == {
        "base": ["class-0", "class-1"],
        "critic": ["class-2", "class-3"],
        "novel": ["class-4", "class-5"],
    }
    assert str(tmp_path) not in (tmp_path / "out" / "circuit" / "config.json").read_text()


def test_speed(gtl_speed, tmp_path):
    assert [row["way"] for row in gtl_speed("--output_dir", tmp_path)["rows"]][1:] == ["grouped", "vmap"]
