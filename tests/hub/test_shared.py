# SPDX-License-Identifier: Apache-2.0
"""What artefacts of all kinds do alike: written, read, shared, refused. What is a kind's own is tested with it."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from ancestries import learngene
from artefacts import assert_same, make_circuit, make_gene, refused
from text_to_image import make_cretok


TRAINING = {"seed": 0, "rates": [0.5, 0.1], "dataset": "letters"}
KINDS = {
    "circuit": lambda: make_circuit(training=TRAINING),
    "cretok": lambda: make_cretok(base_class="StableDiffusion3Pipeline", base_model="me/sd3", training=TRAINING),
    "gene": lambda: make_gene(environment="LearngeneAnt-v0", tasks=["step", "curve"], training=TRAINING),
    "learngene": lambda: learngene("vit"),
}


@pytest.fixture(params=KINDS)
def one(request):
    return KINDS[request.param]()


def test_what_is_written_is_read(one, tmp_path):
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*one.data_files(), "config.json", "README.md"}
    assert_same(one, type(one).from_pretrained(tmp_path))
    assert (tmp_path / "config.json").read_text() == json.dumps(asdict(one.config), indent=2)


def test_push_and_fetch(one, hub, tmp_path):
    (tmp_path / "curves.png").write_bytes(b"\x89PNG")
    one.card = {"images": [tmp_path / "curves.png"], "license": "openrail"}
    assert "me/one" in one.push_to_hub("me/one")
    expected = {*one.data_files(), "config.json", "README.md", "curves.png"}
    assert set(hub.files("me/one")) - {".gitattributes"} == expected
    assert_same(one, type(one).from_pretrained("me/one"))
    with hub.down():
        assert_same(one, type(one).from_pretrained("me/one"))
    card = ModelCard(hub.files("me/one")["README.md"].decode())
    assert card.data.license == "openrail"
    assert '("me/one"' in card.text and "![curves.png](curves.png)" in card.text
    with pytest.raises(RepositoryNotFoundError):
        type(one).from_pretrained("me/nothing")


@pytest.mark.parametrize("card", [{}, {"results": [{"a|b": 1, "c": 2}], "commit": "0123"}], ids=["bare", "results"])
def test_card_is_valid(one, card):
    one.card = card
    found = one.generate_model_card()
    assert "safetensors" in found.data.tags
    assert not any(mark in found.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    assert all(line == line.rstrip() for line in found.content.splitlines())
    blocks = found.text.split("```python\n")[1:]
    assert blocks
    for code in blocks:
        compile(code.split("```")[0], "card", "exec")


def test_what_is_no_artefact(one, tmp_path):
    with pytest.raises(one.error, match="neither a folder nor the id of a repository"):
        type(one).from_pretrained("no/such/place")
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    message = rf"holds no {one.weights[0]}: not a {type(one).__name__} \(pickles are never read\)"
    with pytest.raises(one.error, match=message):
        type(one).from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", "{}", "null", "[" * 100_000])
def test_descriptions_that_are_none(one, tmp_path, text):
    refused(one, tmp_path, "is not a .* that can be used|description|format_version", description=text)


def test_a_file_without_a_description(one, tmp_path):
    refused(one, tmp_path, "without the description of a", key="other")


@pytest.mark.parametrize("version", [2**31, True, "1", None])
def test_versions_that_are_not_known(one, tmp_path, version):
    refused(one, tmp_path, f"format_version={version!r} is n.*update", format_version=version)


def test_more_than_a_description_has(one, tmp_path):
    refused(one, tmp_path, re.escape("has {'extra'}"), extra=1)


@pytest.mark.parametrize("value", [{"a": [{}]}, {"a": float("nan")}, [1]], ids=["nested", "nan", "list"])
@pytest.mark.parametrize("kind", ["circuit", "cretok", "gene"])
def test_settings_that_are_none(kind, tmp_path, value):
    refused(KINDS[kind](), tmp_path, r"training(\['a'\])?=.* must be", training=value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensor: torch.full_like(tensor, torch.nan), "holds? NaN or infinity"),
        (lambda tensor: tensor.to(torch.int8), "is (torch.int8|I8)"),
        (lambda tensor: tensor[..., :-1], "it holds|has the shape"),
    ],
    ids=["nan", "int8", "cut"],
)
def test_tensors_that_are_damaged(one, tmp_path, change, message):
    name, tensor = max(one.data_files()[one.weights[0]].items(), key=lambda item: item[1].numel())
    refused(one, tmp_path, message, tensors={name: change(tensor).contiguous()})


def test_tensors_that_are_too_many(one, tmp_path):
    refused(one, tmp_path, "it holds|unknown ones", tensors={"more": torch.ones(1)})


def test_a_file_that_is_cut(one, tmp_path):
    one.save_pretrained(tmp_path)
    with open(tmp_path / one.weights[0], "r+b") as file:
        file.truncate(100)
    with pytest.raises(one.error, match="cannot be read as safetensors"):
        type(one).from_pretrained(tmp_path)
