# SPDX-License-Identifier: Apache-2.0
"""train_grl.py on tiny evolutions: that it runs and is exact, not how good it is."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_learngene.evolution.grl import Gene


@pytest.fixture(scope="module")
def finished(train_grl, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("finished") / "grl"
    train_grl("--output_dir", folder)
    return folder


def test_help_imports_nothing_heavy(train_grl):
    done = train_grl.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--heritages" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "numpy", "gymnasium", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--num_generations -1", "argument --num_generations: invalid count value: '-1'"),
        ("--num_workers 0", "argument --num_workers: invalid positive value: '0'"),
        ("--heritages lamarck", "argument --heritages: invalid choice: 'lamarck'"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
        ("--hub_token hf_secret --report_to wandb", "--hub_token with --report_to wandb would show your token"),
    ],
)
def test_an_impossible_argument_is_one_line(train_grl, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_grl.module.parse_args(arguments.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "hf_secret" not in last


def test_too_few_agents_are_found_before_any_life(train_grl, tmp_path):
    with pytest.raises(ValueError, match="--population_size 2 is too few for tournaments of 3"):
        train_grl("--population_size", 2, "--output_dir", tmp_path)


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    assert found["commit"] and "python" in found["command"] and found["evolution"]["population_size"] == 4
    assert [row["start"] for row in found["rows"]] == ["gene", "scratch", "full transfer", "other layers"]
    assert list(found["history"]) == ["trained", "birth", "random"]
    assert [len(records) for records in found["history"].values()] == [3, 3, 3]
    first = [records[0]["return"] for records in found["history"].values()]
    assert first[0] == first[1] == first[2]  # all three begin with the same agents
    assert set(found["curves"]) == {"plain", "heavy", "stiff", "weak", "light"}


def test_files(finished):
    pictures = {"generations.png", "logits.png", "learning.png", "lineage.png"}
    there = {path.name for path in finished.iterdir()} - {"agent.gif"}  # which a machine may be unable to draw
    assert there == pictures | {"results.json", "log.jsonl", "checkpoints", "gene"}
    assert all(Image.open(finished / name).width > 300 for name in pictures)
    gene = Gene.from_pretrained(finished / "gene")
    assert gene.config.environment == "LearngeneReacher-v0" and len(gene.config.gene_type) == 2
    assert str(finished) not in (finished / "gene" / "config.json").read_text()


def assert_same_run(one, other):
    found = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for key in ("winner", "rows", "curves", "panels", "logits"):
        assert found[0][key] == found[1][key], key
    genes = [load_file(folder / "gene" / "gene.safetensors") for folder in (one, other)]
    assert all(torch.equal(tensor, genes[1][name]) for name, tensor in genes[0].items())


@pytest.mark.slow
def test_resuming_is_exact(train_grl, finished, tmp_path):
    """A run that stopped after one generation of the first evolution."""
    train_grl("--output_dir", tmp_path, "--num_generations", 0, "--heritages", "trained")
    shutil.rmtree(tmp_path / "gene")
    with pytest.raises(ValueError, match="resume_from_checkpoint='latest'"):
        train_grl("--output_dir", tmp_path)
    train_grl("--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    assert_same_run(finished, tmp_path)


@pytest.mark.slow
def test_two_processes_evolve_as_one(train_grl, finished, tmp_path):
    launcher = "torch.distributed.run --standalone --nproc_per_node 2"
    done = train_grl.launch(launcher, *train_grl.tiny, "--output_dir", tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(finished, tmp_path)


def test_push(train_grl, hub, tmp_path):
    arguments = ("--num_generations", 0, "--heritages", "trained", "--output_dir", tmp_path)
    train_grl(*arguments, "--push_to_hub", "--hub_model_id", "me/gene", "--hub_token", "hf_test")
    assert Gene.from_pretrained("me/gene").config.training["population_size"] == 4
    for content in hub.files("me/gene").values():
        assert str(tmp_path).encode() not in content


@pytest.mark.slow
def test_speed(grl_speed, tmp_path):
    done = grl_speed.launch("", *grl_speed.tiny, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "grl_speed.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["bare", "life", "sb3"] and all(row["steps/s"] > 0 for row in rows)
