# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch

from artefacts import make_circuit, refused
from diffusers_learngene import Circuit
from diffusers_learngene.evolution.gtl.circuit import first_sets
from gtl_hosts import OWN_LAYOUT, VGG, Own, host


def test_descend():
    circuit = make_circuit(training={"seed": 0})
    assert circuit.config.num_parameters == sum(
        tensor.numel() for name, tensor in circuit.tensors.items() if name.endswith(("weight", "bias"))
    )
    descendant = circuit.descend(7, widths=(9, 9, 9))
    assert descendant(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    name = "stages.2.convs.0.weight"
    assert torch.equal(descendant.state_dict()[name][:5, :4], circuit.tensors[name])


def test_card():
    card = make_circuit().generate_model_card(repo_id="me/circuit")
    assert 'Circuit.from_pretrained("me/circuit")' in card.text
    assert card.data.tags == ["learngene", "gtl", "safetensors"]


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


def built_in(**changes):
    return {"architecture": "vgg", "widths": [8, 12, 16], "depths": [1, 2, 1], "image_channels": 3} | changes


LAST = "stages.2.norms.0.bias"


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        ({LAST: torch.ones(6)}, {}, "it holds {"),
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
    ],
)
def test_damaged_files(tmp_path, tensors, changes, message):
    refused(make_circuit(), tmp_path, re.escape(message), tensors=tensors, **changes)
