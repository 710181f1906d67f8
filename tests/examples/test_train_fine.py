# SPDX-License-Identifier: Apache-2.0
"""train_fine.py, as far as it differs from train_wave.py: FINE, its start without an ancestry, and its ablation."""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard

from diffusers_learngene import Learngene


SIZES = ("--descend_sizes", "4", "2")
INITS = ["nearest", "interpolated", "linear", "identical", "random"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(train_fine, tmp_path_factory):
    """The folder of a whole run on the digits."""
    folder = tmp_path_factory.mktemp("finished") / "fine"
    train_fine("--output_dir", folder, *SIZES)
    return folder


def test_help_imports_nothing_heavy(train_fine):
    done = train_fine.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--no_ancestry" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "diffusers", "transformers", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rank 0", "argument --rank: invalid positive value: '0'"),
        ("--start svd", "argument --start: invalid choice: 'svd'"),
        ("--no_ancestry --fit_init", "--no_ancestry takes no"),
        ("--no_ancestry --pretrained_model_name_or_path me/dit", "--no_ancestry takes no"),
        ("--fit_init --pretrained_model_name_or_path me/dit", "--fit_init needs an ancestry that is initialised here"),
    ],
)
def test_an_impossible_argument_is_one_line(train_fine, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_fine.module.parse_args(arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_results(finished):
    ancestry, *rows = results(finished)["rows"]
    assert ancestry["start"] == "ancestry"
    assert [row["start"] for row in rows] == ["learngene", "scratch", "selection"] * 2 + INITS
    assert {row["size"] for row in rows[6:]} == {"layers=2, sigma only"}
    assert all(row[f"val_loss@{step}"] > 0 for row in rows[:6] for step in (0, 1, 2, 4))
    assert all(row[f"val_loss@{step}"] > 0 for row in rows[6:] for step in (0, 1))  # a quarter of the steps
    assert {path.name for path in (finished / "models").iterdir()} == {"ancestry", "layers=4", "layers=2"}
    card = ModelCard.load(finished / "learngene" / "README.md")
    assert "fine" in card.data.tags and "factors U and V" in card.text and "xie2026fine" in card.text


@pytest.mark.slow
def test_the_learngene_descends(finished):
    learngene = Learngene.from_pretrained(finished / "learngene")
    assert learngene.config.method == "fine" and learngene.config.init_seed is None
    assert learngene.config.bank_sizes["transformer_blocks.*.attn1.to_q+to_k+to_v"] == [16]
    assert learngene.config.condensed_for == [{"num_layers": depth} for depth in (2, 3)]
    assert learngene.descend(num_layers=7).merge_and_unload().config.num_layers == 7


@pytest.mark.slow
def test_without_an_ancestry(train_fine, tmp_path):
    """Stage 1 of the paper: nothing is distilled, and there is nothing to select from."""
    train_fine("--no_ancestry", "--fixed_size", "--output_dir", tmp_path, *SIZES)
    assert not (tmp_path / "models" / "ancestry").exists()
    assert [row["start"] for row in results(tmp_path)["rows"]] == ["learngene", "scratch"] * 2 + INITS
    learngene = Learngene.from_pretrained(tmp_path / "learngene")
    assert learngene.config.condensed_for == [{}]


@pytest.mark.slow
def test_fitting_what_training_added(train_fine, tmp_path):
    train_fine("--fit_init", "--start", "fit", "--seed", 3, "--output_dir", tmp_path, *SIZES)
    assert Learngene.from_pretrained(tmp_path / "learngene").config.init_seed == 3


@pytest.mark.slow
def test_resuming_is_exact(train_fine, finished, tmp_path, monkeypatch):
    backward, folder, steps = Accelerator.backward, tmp_path / "fine", iter(range(4 + 3))

    def until_the_power_cut(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        backward(*arguments)

    monkeypatch.setattr(Accelerator, "backward", until_the_power_cut)
    with pytest.raises(KeyboardInterrupt):
        train_fine("--output_dir", folder, *SIZES)
    assert (folder / "checkpoints" / "condense" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    train_fine("--output_dir", folder, *SIZES, "--resume_from_checkpoint", "latest")
    assert results(folder)["rows"] == results(finished)["rows"]
    one, other = (Learngene.from_pretrained(path / "learngene").tensors for path in (finished, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)
