# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_learngene.evolution.gtl.circuit import circuit_shapes, parameters
from diffusers_learngene.evolution.gtl.evaluation import compare, draw_novel_tasks, other_starts, pretrain, summarize
from diffusers_learngene.evolution.gtl.networks import create_network, layout_of
from diffusers_learngene.evolution.gtl.population import Life


@pytest.fixture(scope="module")
def trained(images, classes, tiny):
    return pretrain(images, classes["base"], tiny, Life(200, batch_size=24), seed=0)


def starts_of(trained, tiny):
    sizes = {"0.0": 2, "1.0": 3, "1.1": 3}
    layout = layout_of(tiny)
    circuit = {name: torch.zeros(shape) for name, shape in circuit_shapes(trained, layout, sizes).items()}
    return circuit, other_starts(trained, tiny, circuit, 2, seed=0)


def test_others_inherit_as_much(trained, tiny):
    circuit, starts = starts_of(trained, tiny)
    assert starts["scratch"] == [None, None]
    for name in ("random", "magnitude"):
        assert [parameters(inherited) for inherited in starts[name]] == [parameters(circuit)] * 2
    layout = layout_of(tiny)
    whole = sum(tensor.numel() for name, tensor in trained.items() if name.endswith(("weight", "bias")))
    head = sum(tensor.numel() for name, tensor in trained.items() if name.startswith("head."))
    assert [parameters(inherited) for inherited in starts["full"]] == [whole - head] * 2
    one, two = (inherited[f"{layout[-1].conv}.weight"] for inherited in starts["random"])
    assert not torch.equal(one, two)  # drawn anew for each task


def test_all_of_a_trained_network_is_a_better_start_than_none(images, classes, trained, tiny):
    circuit, starts = starts_of(trained, tiny)
    settings = {"eval_steps": [0, 5], "seed": 0}
    tasks = draw_novel_tasks(images, classes["novel"], 2, num_ways=4, shots=4, validation_shots=6, seed=0)
    found = compare(images, tasks, tiny, starts, Life(10, batch_size=8), **settings)
    assert {name: list(columns) for name, columns in found.items()} == dict.fromkeys(
        starts, ["centroid", "0", "5", "end"]
    )
    assert sum(found["full"]["end"]) > sum(found["scratch"]["end"])
    assert all(0 <= value <= 1 for columns in found.values() for values in columns.values() for value in values)
    again = compare(images, tasks, tiny, {"scratch": starts["scratch"]}, Life(10, batch_size=8), **settings)
    assert again["scratch"]["0"] == found["scratch"]["0"]  # its weights do not depend on who else is compared
    assert summarize({"a": {"end": [0.25, 0.75]}}) == [{"start": "a", "end": "0.500 ± 0.250"}]


def test_pretraining_learns(images, classes, trained, tiny):
    network = create_network(tiny, 12, seed=5)
    network.load_state_dict(trained)
    rows = torch.cat([images.rows[index] for index in classes["base"]])
    outputs = network.eval()(images.images(rows)).argmax(1).view(12, 10)  # in an order of classes of its own
    right = sum(of_class.bincount().max() for of_class in outputs) / 120
    assert right > 0.5 and len(outputs.mode(1).values.unique()) > 6
