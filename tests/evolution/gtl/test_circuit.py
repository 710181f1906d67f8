# SPDX-License-Identifier: Apache-2.0
import re
from functools import partial

import pytest
import torch
from torch import nn

from diffusers_learngene import Circuit
from diffusers_learngene.evolution.gtl.circuit import (
    circuit_sizes,
    extract,
    first_sets,
    inherit_,
    largest_sets,
    mutate,
    overlap,
    parameters,
    random_sets,
    set_sizes,
)
from diffusers_learngene.evolution.gtl.networks import (
    INPUT,
    ConvNet,
    NetworkConfig,
    create_network,
    layout_of,
    widths_of,
)
from gtl_hosts import OWN_LAYOUT, RESNET, VGG, Own, host, lived_


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def alone(circuit, layout, build):
    """The circuit as a narrow network and nothing else."""
    network = build(circuit_sizes(circuit, layout)).eval()
    inherit_(network.state_dict(), layout, circuit)
    assert all(tensor.shape == network.state_dict()[name].shape for name, tensor in circuit.items())
    return network


def narrow(architecture, sizes):
    widths = tuple(sizes[name] for name in ("0.0", "1.0", "2.0"))
    return create_network(NetworkConfig(architecture, widths, (1, 2, 1)), 5, seed=1)


CASES = {"vgg": (VGG, partial(narrow, "vgg")), "resnet": (RESNET, partial(narrow, "resnet"))}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_an_inherited_circuit_computes_what_it_did_whatever_the_rest_is(name, training):
    """Arbitrary random weights around it, of any size, with batch norms that have seen anything."""
    config, build = CASES[name]
    layout, state = layout_of(config), host(config).state_dict()
    sizes = set_sizes(widths_of(state, layout), 0.3)
    circuit = extract(state, layout, random_sets(widths_of(state, layout), sizes, draws()))
    images, last = 3 * torch.randn(4, 3, 16, 16), sizes["2.0"]
    expected = alone(circuit, layout, build).train(training).features(images)
    assert expected.std() > 0.01
    for seed, widths in enumerate([(8, 12, 16), (9, 30, 17), (64, 12, 40)]):
        descendant = host(NetworkConfig(config.architecture, widths, config.depths), seed=seed + 5)
        for parameter in descendant.parameters():
            parameter.data.mul_(3)
        inherit_(descendant.state_dict(), layout, circuit)
        found = descendant.train(training).features(images)
        torch.testing.assert_close(found[:, :last], expected, rtol=1e-5, atol=1e-5)
        assert found[:, last:].abs().max() > 0


def test_without_zeros_it_does_not():
    layout, state = layout_of(VGG), host(VGG).state_dict()
    sizes = set_sizes(widths_of(state, layout), 0.3)
    circuit = extract(state, layout, random_sets(widths_of(state, layout), sizes, draws()))
    images = torch.randn(4, 3, 16, 16)
    expected = alone(circuit, layout, CASES["vgg"][1]).features(images)
    descendant = host(VGG, seed=5)
    inherit_(descendant.state_dict(), layout, circuit, fill="random")
    assert (descendant.features(images)[:, : sizes["2.0"]] - expected).abs().max() > 0.01


def test_the_random_channels_may_read_from_the_circuit():
    layout, network = layout_of(VGG), host(VGG)
    state = network.state_dict()
    circuit = extract(state, layout, first_sets(set_sizes(widths_of(state, layout), 0.3)))
    descendant = host(VGG, seed=5)
    before = descendant.state_dict()["stages.1.convs.0.weight"].clone()
    inherit_(descendant.state_dict(), layout, circuit)
    after, rows = descendant.state_dict()["stages.1.convs.0.weight"], len(circuit["stages.1.convs.0.weight"])
    assert torch.equal(after[rows:], before[rows:])
    assert (after[:rows, circuit["stages.0.convs.0.weight"].shape[0] :] == 0).all()


def test_a_network_of_ones_own():
    """Described through module names: biases, a layer without a norm, a sum whose terms share an index set."""
    network = lived_(Own()).eval()
    state = network.state_dict()
    sizes = set_sizes(widths_of(state, OWN_LAYOUT), 0.3)
    assert sizes == {"trunk": 5, "branch": 7}
    sets = random_sets(widths_of(state, OWN_LAYOUT), sizes, draws())
    circuit = extract(state, OWN_LAYOUT, sets)
    assert "stem.bias" in circuit and "classifier.weight" not in circuit
    narrow = lived_(Own(16), 1).eval()  # 16 and 19 channels
    wide = lived_(Own(31), 2).eval()
    images = torch.randn(2, 3, 9, 9)
    for descendant in (narrow, wide):
        inherit_(descendant.state_dict(), OWN_LAYOUT, circuit)
    torch.testing.assert_close(narrow.features(images)[:, :5], wide.features(images)[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, share", [("vgg11", 0.1998), ("resnet12", 0.2000), ("resnet12-narrow", 0.1996)])
def test_budget_of_the_papers_networks(name, share):
    """The share of convolution weights that a budget of 20% comes to."""
    config = NetworkConfig.named(name)
    with torch.device("meta"):
        state = ConvNet(config, 5).state_dict()
    layout = layout_of(config)
    sizes = set_sizes(widths_of(state, layout), 0.2)
    full = {INPUT: 3} | {kernel.writes: len(state[f"{kernel.conv}.weight"]) for kernel in layout}
    part = {INPUT: 3} | sizes
    kernel_sizes = [(kernel, state[f"{kernel.conv}.weight"][0, 0].numel()) for kernel in layout]
    counts = [sum(n[k.reads] * n[k.writes] * size for k, size in kernel_sizes) for n in (part, full)]
    assert counts[0] / counts[1] == pytest.approx(share, abs=5e-5)
    assert counts[1] == {"vgg11": 9_217_728, "resnet12": 12_414_848, "resnet12-narrow": 7_989_120}[name]


def test_parameters_are_counted_exactly():
    state = host(VGG).state_dict()
    layout = layout_of(VGG)
    sizes = {"0.0": 2, "1.0": 3, "1.1": 4, "2.0": 5}
    circuit = extract(state, layout, first_sets(sizes))
    assert parameters(circuit) == 9 * (3 * 2 + 2 * 3 + 3 * 4 + 4 * 5) + 2 * (2 + 3 + 4 + 5)


@pytest.mark.parametrize("budget", [0, -1, 1.01])
def test_an_impossible_budget(budget):
    with pytest.raises(ValueError, match=f"budget={budget} must lie"):
        set_sizes({"a": 4}, budget)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    layout = layout_of(VGG)
    circuit = extract(host(VGG).state_dict(), layout, first_sets({"0.0": 2, "1.0": 3, "1.1": 4, "2.0": 16}))
    descendant = host(NetworkConfig("vgg", (8, 12, 15), (1, 2, 1)), seed=1)
    before = {name: tensor.clone() for name, tensor in descendant.state_dict().items()}
    with pytest.raises(ValueError, match=r"stages.2.convs.0.weight of the circuit is \(16, 4, 3, 3\)"):
        inherit_(descendant.state_dict(), layout, circuit)
    assert all(torch.equal(before[name], tensor) for name, tensor in descendant.state_dict().items())
    gray = host(NetworkConfig("vgg", (8, 12, 16), (1, 2, 1), image_channels=1))
    with pytest.raises(ValueError, match="of the same image channels"):
        inherit_(gray.state_dict(), layout, circuit)


def own(**changes):
    """A host of its own in which `changes` replace modules by name."""
    network = lived_(Own())
    for name, module in changes.items():
        setattr(network, name, module)
    return network


def test_where_only_the_network_has_a_bias_the_circuit_computes_without():
    network = own(stem=nn.Conv2d(3, 10, 5, stride=2, padding=2, bias=False)).eval()
    circuit = Circuit.extract(network, first_sets({"trunk": 10, "branch": 13}), OWN_LAYOUT)
    assert circuit.config.budget == 1
    descendant, images = lived_(Own(14), 1).eval(), torch.randn(2, 3, 9, 9)
    last = descendant.stem.bias[10:].clone()
    circuit.inherit_(descendant)
    torch.testing.assert_close(descendant.features(images)[:, :10], network.features(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(descendant.stem.bias[10:], last)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stem": nn.Conv2d(3, 10, 5, stride=2, padding=2, bias=False)}, "no ['stem.bias'], which the circuit holds"),
        ({"inner_bn": nn.BatchNorm2d(13, affine=False)}, "no batch norm 'inner_bn' with weights"),
        ({"inner_bn": nn.BatchNorm2d(13, track_running_stats=False)}, "no batch norm 'inner_bn' with weights"),
        ({"inner_bn": nn.BatchNorm2d(12)}, "its norm or bias has the shape (12,), not (13,)"),
        ({"stem": nn.Conv2d(6, 10, 5, groups=2)}, "is not an nn.Conv2d with groups=1"),
        ({"stem": nn.ConvTranspose2d(10, 3, 5, bias=False)}, "is not an nn.Conv2d with groups=1"),
        ({"outer": nn.Conv2d(13, 10, 3)}, "does not fit into (10, 13, 3, 3) of the network"),
    ],
)
def test_a_network_that_cannot_hold_all_of_it_is_left_as_it_was(changes, message):
    circuit = Circuit.extract(Own(), first_sets({"trunk": 3, "branch": 4}), OWN_LAYOUT)
    network = own(**changes)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        circuit.inherit_(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "sets, message",
    [
        ({"trunk": [0, 1]}, "sets are of ['trunk'], and the layout has ['branch', 'trunk']"),
        ({"trunk": [0, 10], "branch": [0]}, "sets['trunk']=[0, 10] must be different channels from 0 to 9"),
        ({"trunk": [-1, 2], "branch": [0]}, "sets['trunk']=[-1, 2] must"),
        ({"trunk": [2, 2], "branch": [0]}, "sets['trunk']=[2, 2] must"),
        ({"trunk": [2], "branch": []}, "sets['branch']=[] must"),
    ],
)
def test_channels_that_no_circuit_can_have(sets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Circuit.extract(
            Own(), {name: torch.tensor(members, dtype=torch.long) for name, members in sets.items()}, OWN_LAYOUT
        )
    with pytest.raises(ValueError, match="is not an nn.Conv2d with groups=1"):
        Circuit.extract(own(stem=nn.Conv2d(6, 10, 5, groups=2)), first_sets({"trunk": 3, "branch": 4}), OWN_LAYOUT)


def test_structure_alone_passes_zeros_and_no_weights():
    layout = layout_of(VGG)
    circuit = extract(host(VGG).state_dict(), layout, first_sets({"0.0": 2, "1.0": 3, "1.1": 4, "2.0": 5}))
    descendant = host(VGG, seed=1)
    before = {name: tensor.clone() for name, tensor in descendant.state_dict().items()}
    inherit_(descendant.state_dict(), layout, circuit, weights=False)
    changed = {name for name, tensor in descendant.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"stages.1.convs.0.weight", "stages.1.convs.1.weight", "stages.2.convs.0.weight"}
    assert (descendant.state_dict()["stages.1.convs.0.weight"][:3, 2:] == 0).all()


def test_largest_channels():
    state = host(RESNET).state_dict()
    for kernel, factor in (("conv3", 0.0), ("shortcut", 1.0)):
        state[f"stages.0.0.{kernel}.weight"].mul_(factor)
    state["stages.0.0.shortcut.weight"][[1, 6]] *= 100
    sets = largest_sets(state, layout_of(RESNET), set_sizes(widths_of(state, layout_of(RESNET)), 0.0625))
    assert sets["0.0"].tolist() == [1, 6]


@pytest.mark.parametrize("rate, swaps", [(0.1, 1), (0.5, 4), (1.0, 4)])
def test_mutation_keeps_sizes(rate, swaps):
    """8 of 12 channels, so that there are 4 others at most."""
    widths, sets = {"a": 12, INPUT: 3}, {"a": torch.tensor([0, 1, 2, 3, 4, 5, 6, 11])}
    generator = draws()
    for _ in range(20):
        mutated, swapped = mutate(sets, widths, generator, probability=1.0, rate=rate)
        assert swapped == swaps and mutated["a"].tolist() == sorted(set(mutated["a"].tolist()))
        assert len(mutated["a"]) == 8 and mutated["a"].min() >= 0 and mutated["a"].max() < 12
        assert len(set(mutated["a"].tolist()) - set(sets["a"].tolist())) == swaps
        assert overlap(sets, mutated) == (8 - swaps) / (8 + swaps)


def test_mutation_probability():
    widths, sets = {"a": 12}, {"a": torch.arange(6)}
    generator = draws()
    count = sum(mutate(sets, widths, generator, probability=0.25)[1] for _ in range(400))
    assert 70 < count < 130
    assert mutate(sets, widths, generator, probability=0.0) == (sets, 0)
    assert overlap(sets, sets) == 1


def test_random_sets_are_seeded():
    widths, sizes = {"a": 30, "b": 7}, {"a": 10, "b": 7}
    one, other = random_sets(widths, sizes, draws(1)), random_sets(widths, sizes, draws(2))
    assert torch.equal(one["a"], random_sets(widths, sizes, draws(1))["a"]) and not torch.equal(one["a"], other["a"])
    assert one["b"].tolist() == list(range(7)) and len(set(one["a"].tolist())) == 10
