# SPDX-License-Identifier: Apache-2.0
"""The artefact: what is written is read, on disk and on the Hub; what is damaged is refused."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from diffusers_learngene import Circuit, CircuitError
from diffusers_learngene.evolution.gtl.artefact import FILE
from diffusers_learngene.evolution.gtl.circuit import random_sets, set_sizes
from diffusers_learngene.evolution.gtl.networks import layout_of, widths_of
from gtl_hosts import OWN_LAYOUT, VGG, Own, host, lived_


def circuit_of(config=VGG, budget=0.3, **training):
    network = host(config)
    widths = widths_of(network.state_dict(), layout_of(config))
    sets = random_sets(widths, set_sizes(widths, budget), torch.Generator().manual_seed(0))
    return Circuit.extract(network, sets, training=training)


def own_circuit():
    network = lived_(Own(), 0)
    widths = widths_of(network.state_dict(), OWN_LAYOUT)
    sets = random_sets(widths, set_sizes(widths, 0.3), torch.Generator().manual_seed(0))
    return Circuit.extract(network, sets, OWN_LAYOUT)


def assert_same(one, other):
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("make", [circuit_of, own_circuit])
def test_save_and_read(make, tmp_path):
    one = make()
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "config.json", "README.md"}
    assert_same(one, Circuit.from_pretrained(tmp_path))
    assert sum(tensor.numel() for tensor in load_file(tmp_path / FILE).values()) < 0.5 * sum(
        tensor.numel() for tensor in host(VGG).state_dict().values()
    )


def test_push_fetch_and_descend(hub, tmp_path):
    one = circuit_of(generations=3)
    one.card = {"results": [{"start": "descendant", "end": "0.7"}]}
    assert "me/circuit" in one.push_to_hub("me/circuit")
    assert set(hub.files("me/circuit")) - {".gitattributes"} == {FILE, "config.json", "README.md"}
    assert_same(one, Circuit.from_pretrained("me/circuit"))
    with hub.down():
        other = Circuit.from_pretrained("me/circuit")
    assert_same(one, other)
    images = torch.randn(2, 3, 16, 16)
    descendants = [circuit.descend(7, widths=(20, 30, 40), seed=3).eval() for circuit in (one, other)]
    assert torch.equal(*(descendant(images) for descendant in descendants))
    card = ModelCard(hub.files("me/circuit")["README.md"].decode())
    assert 'from_pretrained("me/circuit")' in card.text and "| descendant | 0.7 |" in card.text


@pytest.mark.parametrize("make", [circuit_of, own_circuit])
def test_card(make):
    text = make().generate_model_card()
    assert not any(mark in text.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    assert all(line == line.rstrip() for line in text.content.splitlines())
    for code in text.text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


def test_what_cannot_descend_says_so():
    with pytest.raises(ValueError, match="does not fit into"):
        circuit_of().descend(5, widths=(2, 30, 40))
    with pytest.raises(ValueError, match="architecture='mlp' is not one of"):
        circuit_of().descend(5, architecture="mlp")
    with pytest.raises(ValueError, match="this circuit is of a network of its own"):
        own_circuit().descend(5)
    with pytest.raises(ValueError, match="the network has no convolution"):
        own_circuit().inherit_(host(VGG))


def damaged(folder, **changes):
    """The file of a circuit, with these entries of its description changed."""
    circuit_of().save_pretrained(folder)
    description = json.loads((folder / "config.json").read_text()) | changes
    save_file(load_file(folder / FILE), folder / FILE, metadata={"circuit": json.dumps(description)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "format_version=2 is not 1"),
        ({"extra": 1}, "has {'extra'}"),
        ({"layout": []}, "which are not in the layout"),
        (
            {"layout": [{"conv": "../a", "norm": None, "reads": "input", "writes": "a"}]},
            "must be the name of a module",
        ),
        ({"layout": [1]}, "the description of a Kernel lacks"),
        ({"shapes": {}}, "shapes lacks"),
        ({"shapes": {"a": [10**9]}}, "not whole numbers from 1 to"),
        ({"host": {"architecture": "vgg"}}, "the description of a NetworkConfig lacks"),
        ({"host_parameters": 1}, "host_parameters=1: the circuit has"),
        ({"training": {"a": [{}]}}, "training['a']=[{}] must be a number"),
        ({"training": [1]}, "training=[1] must be a dict"),
    ],
)
def test_descriptions_that_lie(tmp_path, changes, message):
    damaged(tmp_path, **changes)
    with pytest.raises(CircuitError, match=re.escape(message)):
        Circuit.from_pretrained(tmp_path)


def test_damaged_files(tmp_path):
    circuit_of().save_pretrained(tmp_path)
    tensors, metadata = load_file(tmp_path / FILE), {"circuit": (tmp_path / "config.json").read_text()}
    name = next(iter(tensors))
    for change, message in (
        ({name: torch.full_like(tensors[name], torch.nan)}, "holds NaN or infinity"),
        ({name: tensors[name].to(torch.int8)}, "is torch.int8, which is no floating-point type"),
        ({name: tensors[name][:1]}, "it holds"),
        ({"more": torch.ones(1)}, "it holds"),
    ):
        save_file(tensors | change, tmp_path / FILE, metadata=metadata)
        with pytest.raises(CircuitError, match=re.escape(message)):
            Circuit.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CircuitError, match="without the description of a circuit"):
        Circuit.from_pretrained(tmp_path)
    with open(tmp_path / FILE, "r+b") as file:
        file.truncate(100)
    with pytest.raises(CircuitError, match="cannot be read as safetensors"):
        Circuit.from_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CircuitError, match="holds no circuit.safetensors: not a Circuit"):
        Circuit.from_pretrained(tmp_path)
