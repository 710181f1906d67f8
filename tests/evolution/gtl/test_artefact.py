# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_learngene import Circuit, CircuitError
from diffusers_learngene.evolution.gtl.circuit import first_sets
from gtl_hosts import OWN_LAYOUT, VGG, Own, host


SIZES = {"0.0": 2, "1.0": 3, "1.1": 4, "2.0": 5}


def make(**options):
    return Circuit.extract(host(VGG), first_sets(SIZES), **options)


def assert_same(one, other):
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_save_read_and_descend(tmp_path):
    one = make(training={"seed": 0})
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"circuit.safetensors", "config.json", "README.md"}
    other = Circuit.from_pretrained(tmp_path)
    assert_same(one, other)
    assert other.config.num_parameters == sum(
        tensor.numel() for name, tensor in one.tensors.items() if name.endswith(("weight", "bias"))
    )
    descendant = other.descend(7, widths=(9, 9, 9))
    assert descendant(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    name = "stages.2.convs.0.weight"
    assert torch.equal(descendant.state_dict()[name][:5, :4], one.tensors[name])


def test_push_and_fetch(hub):
    one = make()
    one.push_to_hub("me/circuit")
    assert set(hub.files("me/circuit")) - {".gitattributes"} == {"circuit.safetensors", "config.json", "README.md"}
    assert_same(one, Circuit.from_pretrained("me/circuit"))
    card = ModelCard(hub.files("me/circuit")["README.md"].decode())
    assert 'Circuit.from_pretrained("me/circuit")' in card.text and card.data.tags == [
        "learngene",
        "gtl",
        "safetensors",
    ]
    assert not any(mark in card.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_of_a_network_that_is_not_built_in(tmp_path):
    with pytest.raises(ValueError, match="but a Own is not built in"):
        Circuit.extract(Own(), {})
    Circuit.extract(Own(), first_sets({"trunk": 3, "branch": 4}), OWN_LAYOUT).save_pretrained(tmp_path)
    circuit, network = Circuit.from_pretrained(tmp_path), Own(12)
    circuit.inherit_(network)
    assert torch.equal(network.stem.bias[:3], circuit.tensors["stem.bias"])
    with pytest.raises(ValueError, match="of a network of its own"):
        circuit.descend(5)
    with pytest.raises(ValueError, match="no convolution 'stem'"):
        circuit.inherit_(host(VGG))


def rewrite(folder, tensors=None, **changes):
    make().save_pretrained(folder)
    path = folder / "circuit.safetensors"
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["circuit"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(found | (tensors or {}), path, metadata={"circuit": json.dumps(description | changes)})


def built_in(**changes):
    return {"architecture": "vgg", "widths": [8, 12, 16], "depths": [1, 2, 1], "image_channels": 3} | changes


LAST = "stages.2.norms.0.bias"


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        ({"more": torch.ones(1)}, {}, "it holds {"),
        ({LAST: torch.ones(6)}, {}, "it holds {"),
        ({LAST: torch.full((5,), torch.nan)}, {}, f"{LAST} holds NaN or infinity"),
        ({LAST: torch.ones(5, dtype=torch.int8)}, {}, f"{LAST} is torch.int8"),
        ({}, {"format_version": 2}, "format_version=2 is not 1"),
        ({}, {"extra": 1}, "has {'extra'}"),
        ({}, {"layout": []}, "which are not in the layout"),
        ({}, {"layout": 3}, "layout must be a list"),
        ({}, {"shapes": {}}, "shapes lacks"),
        ({}, {"shapes": {"a": 10**9}}, "shapes must be lists"),
        ({}, {"shapes": {"a": [10**9]}}, "not 1 or 4 whole numbers from 1"),
        ({}, {"host_parameters": 3}, "host_parameters=3: the circuit has"),
        ({}, {"host": {"architecture": "os.system"}}, "the description of a NetworkConfig lacks"),
        ({}, {"shapes": {"a": [8192] * 6}}, "not 1 or 4 whole numbers"),
        ({}, {"host": built_in(widths=[8, 12, 4])}, "is (5, 4, 3, 3), which is no part of (4, 12"),
        ({}, {"host": built_in(image_channels=4)}, "is (2, 3, 3, 3), which is no part of (8, 4,"),
        (
            {},
            {"host": built_in(widths=[8, 12, 17])},
            ", but host=NetworkConfig(architecture='vgg', widths=(8, 12, 17)",
        ),
        ({}, {"host": built_in(depths=[1, 2, 2])}, "has another layout than this one"),
        ({}, {"host": built_in(depths=[1, 2, 10**6])}, "must be whole numbers from 1 to 64"),
        ({}, {"host": built_in(widths=[8192] * 3), "host_parameters": 1812226048}, "parameters, more than 1073741824"),
        ({}, {"training": {"a": [{}]}}, "training['a']=[{}] must be a number"),
    ],
)
def test_damaged_files(tmp_path, tensors, changes, message):
    rewrite(tmp_path, tensors, **changes)
    with pytest.raises(CircuitError, match=re.escape(message)):
        Circuit.from_pretrained(tmp_path)


def test_what_is_no_artefact(tmp_path):
    torch.save({}, tmp_path / "circuit.bin")
    with pytest.raises(CircuitError, match=re.escape("holds no circuit.safetensors: not a Circuit")):
        Circuit.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    with open(tmp_path / "circuit.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CircuitError, match="cannot be read as safetensors"):
        Circuit.from_pretrained(tmp_path)
