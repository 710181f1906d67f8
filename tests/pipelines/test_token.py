# SPDX-License-Identifier: Apache-2.0
"""The artefact: what is written is read, on disk and on the Hub; what is damaged is refused."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from diffusers_learngene import CreTok, CreTokError
from diffusers_learngene.pipelines.token import CreTokConfig
from text_to_image import make_cretok


FILES = {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "config.json", "README.md"}
FULL = {
    "base_class": "StableDiffusion3Pipeline",
    "base_model": "me/sd3",
    "training": {"theta": [0.5, 0.4], "steps": 9},
}


def assert_same(one, other):
    assert one.config == other.config and one.rows.keys() == other.rows.keys()
    assert all(torch.equal(row, other.rows[name]) for name, row in one.rows.items())


def test_save_and_read(tmp_path):
    one = make_cretok(**FULL)
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert_same(one, CreTok.from_pretrained(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(one.config)
    for name, width in (("", 16), ("_2", 24)):  # the layout of diffusers' textual inversion
        assert load_file(tmp_path / f"learned_embeds{name}.safetensors")["<CreTok>"].shape == (1, width)


def test_a_smaller_artefact_leaves_nothing_of_the_larger(tmp_path):
    make_cretok("sdxl").save_pretrained(tmp_path)
    make_cretok("sd").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"learned_embeds_2.safetensors"}
    assert_same(make_cretok("sd"), CreTok.from_pretrained(tmp_path))


def test_push_and_fetch(hub, tmp_path):
    one = make_cretok(**FULL)
    (tmp_path / "examples.png").write_bytes(b"\x89PNG")
    one.card = {"images": [tmp_path / "examples.png"], "license": "openrail"}
    assert "me/cretok" in one.push_to_hub("me/cretok")
    assert set(hub.files("me/cretok")) - {".gitattributes"} == {*FILES, "examples.png"}
    assert_same(one, CreTok.from_pretrained("me/cretok"))
    with hub.down():
        assert_same(one, CreTok.from_pretrained("me/cretok"))
    card = ModelCard(hub.files("me/cretok")["README.md"].decode())
    assert card.data.base_model == "me/sd3" and card.data.license == "openrail"
    assert 'load_cretok("me/cretok")' in card.text and "![examples.png](examples.png)" in card.text
    with pytest.raises(RepositoryNotFoundError):
        CreTok.from_pretrained("me/nothing")


@pytest.mark.parametrize("config", [{}, FULL], ids=["bare", "full"])
@pytest.mark.parametrize("card", [{}, {"results": [{"a|b": 1, "c": 2}], "commit": "0123"}], ids=["bare", "results"])
def test_card(config, card):
    one = make_cretok(**config)
    one.card = card
    text = one.generate_model_card()
    assert "16 numbers for `text_encoder` and 24 numbers for `text_encoder_2`" in text.text
    assert 'weight_name="learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2' in text.text
    assert not any(mark in text.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    assert all(line == line.rstrip() for line in text.content.splitlines())
    for code in text.text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


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
        ({"training": {"a": [{}]}}, "training['a']=[{}] must be a number"),
        ({"training": {"a": float("nan")}}, "training['a']=nan must be a number"),
        ({"format_version": 2}, "format_version=2 is not 1: update"),
        ({"format_version": True}, "format_version=True is not 1"),
    ],
)
def test_what_no_config_may_say(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CreTokConfig(**{"encoders": {"text_encoder": 16}, **changes})


def description(**changes):
    return {"cretok": json.dumps(asdict(make_cretok("sd").config) | changes)}


@pytest.mark.parametrize(
    "metadata, tensors, message",
    [
        (None, {}, "without the description of a CreTok"),
        ({"cretok": "[1]"}, {}, "the description of a CreTokConfig lacks"),
        ({"cretok": "{"}, {}, "not a CreTok that can be used"),
        (description(extra=1), {}, "has {'extra'}"),
        (description(token=[]), {}, "token=[] must be one word"),
        (description(encoders={"text_encoder": 17}), {}, "(1, 17)"),
        (description(), {"<CreTok>": torch.ones(2, 16)}, "it holds {'<CreTok>': (2, 16)}"),
        (description(), {"<CreTok>": torch.ones(1, 16), "b": torch.ones(1)}, "it holds"),
        (
            description(),
            {"<CreTok>": torch.ones(1, 16, dtype=torch.int8)},
            "<CreTok> is torch.int8, which is no floating-point type",
        ),
        (description(), {"<CreTok>": torch.full((1, 16), torch.nan)}, "holds NaN or infinity"),
        (description(encoders={"text_encoder": 16, "text_encoder_2": 24}), {}, "are not of one CreTok"),
    ],
)
def test_damaged_files(tmp_path, metadata, tensors, message):
    save_file(tensors or {"<CreTok>": torch.ones(1, 16)}, tmp_path / "learned_embeds.safetensors", metadata=metadata)
    with pytest.raises(CreTokError, match=re.escape(message)):
        CreTok.from_pretrained(tmp_path)


def test_what_is_no_artefact(tmp_path):
    torch.save({"<CreTok>": torch.ones(16)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(CreTokError, match="holds no learned_embeds.safetensors: not a CreTok"):
        CreTok.from_pretrained(tmp_path)
    with pytest.raises(CreTokError, match="neither a folder nor the id of a repository"):
        CreTok.from_pretrained("no/such/place")
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
