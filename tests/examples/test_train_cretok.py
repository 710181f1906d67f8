# SPDX-License-Identifier: Apache-2.0
"""train_cretok.py and the benchmarks of CreTok on tiny models: that they run and are exact, not how good they are."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_learngene import CreTok, CreTokPipeline
from diffusers_learngene.pipelines.encoders import clip_encoders
from text_to_image import pipeline


SETS = ["training pairs", "unseen pairs", "unseen concepts"]


@pytest.fixture(scope="module")
def finished(train_cretok, tmp_path_factory):
    """The folder of a whole run on the toy world."""
    folder = tmp_path_factory.mktemp("finished") / "cretok"
    train_cretok("--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny SDXL of which the denoiser and the VAE are missing."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipeline("sdxl").save_pretrained(folder)
    return folder


def test_help_imports_nothing_heavy(train_cretok):
    done = train_cretok.launch("", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--theta" in done.stdout
    imported = set(re.findall(r"\| *([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "diffusers", "transformers", "diffusers_learngene"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--theta 1.5", "argument --theta: invalid cosine value: '1.5'"),
        ("--max_train_steps 0", "argument --max_train_steps: invalid positive value: '0'"),
        ("--text_embedding flat", "argument --text_embedding: invalid choice: 'flat'"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
        ("--hub_token hf_secret --report_to wandb", "--hub_token with --report_to wandb would show your token"),
        ("--validation_pairs bee", "argument --validation_pairs: invalid pair value: 'bee'"),
        ("--validation_pairs bee,owl", "--validation_pairs needs --pretrained_model_name_or_path"),
    ],
)
def test_an_impossible_argument_is_one_line(train_cretok, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_cretok.module.parse_args(arguments.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "hf_secret" not in last


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--theta -0.5", "theta=-0.5 is reached before the training by"),
        ("--theta 0.9 0.9 0.9", "theta=[0.9, 0.9, 0.9] must be one number, or one for each of ['text_encoder', "),
        ("--initializer_token zebra", "initializer_token='zebra' is ["),
        ("--template none", "template='none' must hold {} once"),
        ("--pairs_file nowhere.txt", "pairs_file='nowhere.txt' cannot be read"),
        ("--pretrained_model_name_or_path nowhere", "'nowhere' holds no pipeline"),
        ("--report_to nothing", "report_to='nothing' is not one of"),
        ("--placeholder_token two\u00a0words", "must be one word"),
    ],
    ids=lambda value: None if value[0] == "-" else "",
)
def test_what_cannot_be_is_found_before_training(train_cretok, sdxl, words, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(Accelerator, "backward", None)
    base = ("--pretrained_model_name_or_path", sdxl, "--pairs_file", words)
    with pytest.raises(ValueError, match=re.escape(message)):
        train_cretok(*base, "--output_dir", tmp_path / "out", *arguments.split(" "))


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    assert found["commit"] and "python" in found["command"] and found["machine"] and found["seed"] == 0
    assert [row["token"] for row in found["rows"]] == ['"creative"', "random", "CreTok", "one pair"]
    for row in found["rows"]:
        assert list(row) == ["token", *(name + end for name in SETS for end in ("", " p10"))]
        assert all(-1 <= row[f"{name} p10"] <= row[name] <= 1 for name in SETS)
        lengths = [len(found["cosines"][row["token"]][name]["text_encoder"]) for name in SETS]
        assert lengths == [400, 54, 48]
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"clip/loss", "cretok/loss", "cretok/unseen pairs", "one pair/unseen pairs"} <= logged


def test_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("results.json", "similarity.png", "curves.png", "world.png", "log.jsonl", "cretok", "models", "checkpoints")
    }
    assert {path.name for path in (finished / "cretok").iterdir()} == {
        *("learned_embeds.safetensors", "config.json", "README.md", "similarity.png", "curves.png")
    }
    cretok = CreTok.from_pretrained(finished / "cretok")
    assert cretok.config.encoders == {"text_encoder": 64} and cretok.config.training["theta"] == [0.999]
    assert str(finished) not in (finished / "cretok" / "config.json").read_text()


def assert_same_run(one, other):
    assert (
        json.loads((one / "results.json").read_text())["cosines"]
        == json.loads((other / "results.json").read_text())["cosines"]
    )
    name = "cretok/learned_embeds.safetensors"
    assert torch.equal(*(load_file(folder / name)["<CreTok>"] for folder in (one, other)))


@pytest.mark.slow
def test_resuming_is_exact(train_cretok, finished, tmp_path):
    """A run that was killed half-way through the CLIP, and one half-way through the token."""
    train_cretok("--output_dir", tmp_path / "whole", "--checkpoints_total_limit", 2)
    assert_same_run(finished, tmp_path / "whole")
    for stage, later in (("clip", ["cretok", "one_pair"]), ("cretok", ["one_pair"])):
        again = tmp_path / stage
        shutil.copytree(tmp_path / "whole", again)
        shutil.rmtree(again / "cretok")
        for name in later:
            shutil.rmtree(again / "checkpoints" / name)
        shutil.rmtree(again / "checkpoints" / stage / "checkpoint-4")
        train_cretok("--output_dir", again, "--resume_from_checkpoint", "latest")
        assert_same_run(finished, again)


def test_a_base_needs_its_text_encoders_only(train_cretok, sdxl, words, hub, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sdxl, base)
    for part in ("unet", "vae", "scheduler"):
        shutil.rmtree(base / part)
    found = train_cretok(
        *("--pretrained_model_name_or_path", base, "--pairs_file", words, "--output_dir", folder),
        *("--text_embedding", "mean", "--theta", 0.999, 0.99, "--mixed_precision", "bf16"),
        *("--push_to_hub", "--hub_model_id", "me/cretok", "--hub_token", "hf_test"),
    )
    assert [row["token"] for row in found["rows"]] == ['"creative"', "random", "CreTok"]
    cretok = CreTok.from_pretrained("me/cretok")
    assert cretok.config.base_class == "StableDiffusionXLPipeline" and cretok.config.base_model is None
    assert cretok.config.training["theta"] == [0.999, 0.99]
    pipe = CreTokPipeline.from_pretrained(sdxl)
    pipe.load_cretok("me/cretok")
    for name, encoder in clip_encoders(pipe.components).items():
        assert torch.equal(encoder.table.weight[-1], cretok.rows[name])
        start = encoder.table.weight[encoder.tokenizer.get_vocab()["creative</w>"]]
        assert 0 < (cretok.rows[name] - start).abs().max() < 0.1
    for content in hub.files("me/cretok").values():
        assert str(tmp_path).encode() not in content


def test_example_images(train_cretok, sdxl, words, tmp_path):
    train_cretok(
        *("--pretrained_model_name_or_path", sdxl, "--pairs_file", words, "--output_dir", tmp_path),
        *("--validation_pairs", "bee,owl", "lettuce,mantis"),
    )
    assert (tmp_path / "cretok" / "examples.png").stat().st_size > 1000
    assert "![examples.png](examples.png)" in (tmp_path / "cretok" / "README.md").read_text()


def test_speed(cretok_speed, tmp_path):
    rows = cretok_speed("--output_dir", tmp_path)
    assert [row["update"] for row in rows] == ["ours", "cached", "naive"]
    assert all(float(row["error of the gradient"]) < 1e-4 for row in rows) and rows[0]["naive / this"] > 1
    assert json.loads((tmp_path / "cretok_speed.json").read_text())["pairs"] == 4
