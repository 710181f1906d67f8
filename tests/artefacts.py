# SPDX-License-Identifier: Apache-2.0
"""Small artefacts that tests share, and what they ask of all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_learngene import Circuit
from diffusers_learngene.evolution.grl import Gene, GeneConfig
from diffusers_learngene.evolution.grl.genes import tensors_of
from diffusers_learngene.evolution.grl.network import Network
from diffusers_learngene.evolution.gtl.circuit import first_sets
from gtl_hosts import VGG, host


def make_gene(gene_type=(0, 5), **facts):
    arrays = tensors_of(Network(3, 1, seed=0).actor(), gene_type)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Gene(GeneConfig(list(gene_type), shapes, **facts), tensors)


def make_circuit(**options):
    return Circuit.extract(host(VGG), first_sets({"0.0": 2, "1.0": 3, "1.1": 4, "2.0": 5}), **options)


def assert_same(one, other):
    """That two artefacts of any kind say and hold the same."""
    assert one.config == other.config
    files, others = one.data_files(), other.data_files()
    assert files.keys() == others.keys()
    for file, tensors in files.items():
        assert tensors.keys() == others[file].keys()
        assert all(torch.equal(tensor, others[file][name]) for name, tensor in tensors.items())


def refused(one, folder, message, *, tensors=(), key=None, description=None, **changes):
    """Assert that the artefact is refused, and its file named, with these tensors or this description in the first.

    Args:
        key: where the description is instead.
        changes: of single entries of the description.
    """
    one.save_pretrained(folder)
    path = folder / one.weights[0]
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()[one.key])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    text = json.dumps(old | changes) if description is None else description
    save_file(found | dict(tensors), path, metadata={key or one.key: text})
    with pytest.raises(one.error, match=message) as caught:
        type(one).from_pretrained(folder)
    assert str(path) in str(caught.value)
