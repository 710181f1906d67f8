# SPDX-License-Identifier: Apache-2.0
"""The artefact: the layout of its files, its card, and what its description cannot say."""

import re

import pytest
import torch
from safetensors.torch import load_file

from artefacts import assert_same, refused
from diffusers_learngene import CreTok, CreTokError
from diffusers_learngene.pipelines.token import CreTokConfig
from text_to_image import make_cretok


FILES = {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "config.json", "README.md"}
FULL = {
    "base_class": "StableDiffusion3Pipeline",
    "base_model": "me/sd3",
    "training": {"theta": [0.5, 0.4], "steps": 9},
}


def test_the_layout_is_that_of_textual_inversion(tmp_path):
    make_cretok(**FULL).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name, width in (("", 16), ("_2", 24)):
        assert load_file(tmp_path / f"learned_embeds{name}.safetensors")["<CreTok>"].shape == (1, width)


def test_a_smaller_artefact_leaves_nothing_of_the_larger(tmp_path):
    make_cretok("sdxl").save_pretrained(tmp_path)
    make_cretok("sd").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"learned_embeds_2.safetensors"}
    assert_same(make_cretok("sd"), CreTok.from_pretrained(tmp_path))


@pytest.mark.parametrize("config", [{}, FULL], ids=["bare", "full"])
def test_card(config):
    card = make_cretok(**config).generate_model_card(repo_id="me/cretok")
    assert "16 numbers for `text_encoder` and 24 numbers for `text_encoder_2`" in card.text
    assert 'weight_name="learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2' in card.text
    assert 'load_cretok("me/cretok")' in card.text and card.data.base_model == config.get("base_model")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoders": {}}, "encoders={} must name some of"),
        ({"encoders": {"unet": 3}}, "encoders={'unet': 3} must name some of"),
        ({"encoders": {"text_encoder": 2.0}}, "the width 2.0 of text_encoder must be a number from 1 to"),
        ({"encoders": {"text_encoder": 10**9}}, "the width 1000000000 of text_encoder"),
        ({"token": "two words"}, "token='two words' must be one word"),
        ({"token": 3}, "token=3 must be one word"),
        ({"plain_word": " "}, "plain_word=' ' must be words"),
        ({"template": "none"}, "template='none' must hold {} once"),
        ({"base_class": "os.system"}, "base_class='os.system' must be the name of a class"),
        ({"base_model": "/home/me"}, "base_model='/home/me' must be a Hub id"),
    ],
)
def test_what_no_config_may_say(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CreTokConfig(**{"encoders": {"text_encoder": 16}, **changes})


@pytest.mark.parametrize(
    "changes, tensors, message",
    [
        ({"token": []}, {}, "token=[] must be one word"),
        ({"encoders": {"text_encoder": 17}}, {}, "(1, 17)"),
        ({}, {"<CreTok>": torch.ones(2, 16)}, "it holds {'<CreTok>': (2, 16)}"),
        ({"encoders": {"text_encoder": 16, "text_encoder_2": 24}}, {}, "are not of one CreTok"),
    ],
)
def test_damaged_files(tmp_path, changes, tensors, message):
    refused(make_cretok("sd"), tmp_path, re.escape(message), tensors=tensors, **changes)


def test_a_second_file_that_is_cut(tmp_path):
    make_cretok().save_pretrained(tmp_path)
    with open(tmp_path / "learned_embeds_2.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CreTokError, match="cannot be read as safetensors"):
        CreTok.from_pretrained(tmp_path)


def test_files_of_two_artefacts_are_no_artefact(tmp_path):
    make_cretok(plain_word="odd").save_pretrained(tmp_path)
    kept = (tmp_path / "learned_embeds.safetensors").read_bytes()
    make_cretok().save_pretrained(tmp_path)
    (tmp_path / "learned_embeds.safetensors").write_bytes(kept)  # as after a crash between two files
    with pytest.raises(CreTokError, match="are not of one CreTok"):
        CreTok.from_pretrained(tmp_path)
