# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_learngene.evolution.gtl.circuit import extract, first_sets, inherit_
from diffusers_learngene.evolution.gtl.networks import create_network, layout_of
from diffusers_learngene.evolution.gtl.population import Life, Population, accuracy, centroid_accuracy, live
from diffusers_learngene.evolution.gtl.tasks import draw_task
from gtl_hosts import RESNET, VGG, Own, host, lived_


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def networks_of(kind):
    if kind == "own":
        return [lived_(Own(), seed) for seed in range(3)]
    return [host({"vgg": VGG, "resnet": RESNET}[kind], seed) for seed in range(3)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_a_population_computes_what_its_networks_compute(kind, training):
    networks = networks_of(kind)
    population = Population(networks).train(training)
    images = torch.randn(3, 4, 3, 16, 16)
    for function in ("forward", "features"):
        found = getattr(population, function)(images)
        for index, network in enumerate(networks):
            expected = getattr(network.train(training), function)(images[index])
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-5)
    for index, network in enumerate(networks):  # running statistics, too
        for name, tensor in population.state_of(index).items():
            torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_its_networks_share_its_memory():
    population = Population(networks_of("vgg"))
    population.state_of(1)["head.bias"].fill_(7)
    assert population.network.head.bias.tolist() == [
        *networks_of("vgg")[0].head.bias.tolist(),
        *[7] * 5,
        *networks_of("vgg")[2].head.bias.tolist(),
    ]


def test_a_module_that_does_not_divide_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm((4, 8, 8)))
    with pytest.raises(ValueError, match="1 is a LayerNorm, of which no population can be made"):
        Population([network] * 2)
    with pytest.raises(ValueError, match="0 is a Conv2d"):
        Population([nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))] * 2)


def test_networks_of_ones_own_form_populations():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2, bias=False))
    population = Population([network] * 2)
    images = torch.randn(2, 5, 3, 8, 8)
    torch.testing.assert_close(population(images)[1], network(images[1]), rtol=1e-4, atol=1e-5)


def unusual(case, seed=0):
    """A network with a module that is set to something else than torch's defaults."""
    torch.manual_seed(seed)
    conv, norm, head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 2)
    match case:
        case "conv":
            conv = nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
        case "same":
            conv = nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular", bias=False)
        case "norm":
            norm = nn.BatchNorm2d(6, eps=0.5, momentum=0.7)
        case "average":
            norm = nn.BatchNorm2d(6, momentum=None)
        case "no scale":
            norm = nn.BatchNorm2d(6, affine=False)
        case "no statistics":
            norm = nn.BatchNorm2d(6, track_running_stats=False)
        case "frozen":
            conv.requires_grad_(False)
        case "double":
            pass
    network = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    lived_(network, seed) if case not in ("no scale", "no statistics") else None
    return network.double() if case == "double" else network


UNUSUAL = ["conv", "same", "norm", "average", "no scale", "no statistics", "frozen", "double"]


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_settings_are_kept(case):
    networks = [unusual(case, seed) for seed in range(3)]
    population = Population(networks)
    images = torch.randn(3, 4, 3, 9, 9, dtype=networks[0][0].weight.dtype)
    for training in (True, True, False):  # twice, as statistics move
        found = population.train(training)(images)
        for index, network in enumerate(networks):
            expected = network.train(training)(images[index])
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-5)
    for index, network in enumerate(networks):
        state = population.state_of(index)
        assert state.keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    frozen = {name for name, parameter in population.network.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"0.weight", "0.bias"} if case == "frozen" else set())


def test_networks_with_different_settings_are_no_population():
    with pytest.raises(ValueError, match=r"networks \[1, 2\] have other modules or settings"):
        Population([unusual("norm"), unusual("conv"), unusual("average")])


def alone(network, images, task, life, generator):
    """What `live` does, written out for one network."""
    optimizer = torch.optim.SGD(network.parameters(), lr=life.learning_rate, momentum=0.9, weight_decay=5e-4)
    total, count = life.steps * life.batch_size, len(task.train_rows)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-total // count))])
    network.train()
    for step in range(life.steps):
        optimizer.param_groups[0]["lr"] = life.learning_rate * (1 + math.cos(math.pi * step / life.steps)) / 2
        chosen = order[step * life.batch_size : (step + 1) * life.batch_size]
        loss = F.cross_entropy(network(images.images(task.train_rows[chosen])), task.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_living_together_is_living_alone(images, tiny):
    tasks = [draw_task(images, range(12), 3, draws(seed), validation_shots=4) for seed in range(3)]
    networks = [create_network(tiny, 3, seed=seed) for seed in range(3)]
    life, population = Life(6, batch_size=7), Population(networks)
    live(population, images, tasks, life, [draws(seed) for seed in range(3)])
    for index, network in enumerate(networks):
        alone(network, images, tasks[index], life, draws(index))
        for name, tensor in population.state_of(index).items():
            torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-4, atol=1e-5)
        right = network.eval()(images.images(tasks[index].validation_rows)).argmax(1) == tasks[index].validation_labels
        assert accuracy(population, images, tasks)[index] == pytest.approx(right.float().mean().item())


def test_a_closed_circuit_stays_closed(images, tiny):
    layout = layout_of(tiny)
    circuit = extract(create_network(tiny, 3, seed=0).state_dict(), layout, first_sets({"0.0": 2, "1.0": 3, "1.1": 3}))
    task = draw_task(images, range(12), 3, draws())
    for keep in (True, False):
        newborn = create_network(tiny, 3, seed=1)
        inherit_(newborn.state_dict(), layout, circuit)
        population = Population([newborn] * 2)
        live(population, images, [task] * 2, Life(3, batch_size=5), [draws(0), draws(1)], keep_zeros=keep)
        state = population.state_of(1)
        assert (state["stages.1.convs.0.weight"][:3, 2:].abs().max().item() == 0) is keep
        assert not torch.equal(state["stages.1.convs.0.weight"][:3, :2], circuit["stages.1.convs.0.weight"])


def test_it_is_watched(images, tiny):
    seen, task = [], draw_task(images, range(12), 3, draws())
    population = Population([create_network(tiny, 3, seed=1)])

    def look(step):
        seen.append((step, population.training))
        population.eval()

    live(population, images, [task], Life(3, batch_size=5), [draws()], watch={0: look, 2: look, 3: look})
    assert seen == [(0, True), (2, True), (3, True)]


def test_nearest_centroid(images, tiny):
    tasks = [draw_task(images, range(12), 3, draws(seed), shots=4, validation_shots=4) for seed in range(2)]
    networks = [create_network(tiny, 3, seed=seed).eval() for seed in range(2)]
    found = centroid_accuracy(Population(networks), images, tasks)
    for index, (network, task) in enumerate(zip(networks, tasks, strict=True)):
        train = F.normalize(network.features(images.images(task.train_rows)), dim=1)
        test = F.normalize(network.features(images.images(task.validation_rows)), dim=1)
        means = torch.stack([F.normalize(train[task.train_labels == k].mean(0), dim=0) for k in range(3)])
        right = (test @ means.T).argmax(1) == task.validation_labels
        assert found[index] == pytest.approx(right.float().mean().item())
