# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_learngene import KINDConfig, Learngene
from diffusers_learngene.anatomy.dit import create_dit
from diffusers_learngene.runs.report import mean_curves, mean_rows
from diffusers_learngene.training.ways import (
    add_adapter,
    count_flops,
    count_parameters,
    sigma_groups,
    with_classes,
)


@pytest.fixture
def dit():
    """Of 3 classes, and with random weights where DiT starts from zero."""
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 4}
    model = create_dit(
        generator=torch.Generator().manual_seed(0), **sizes, in_channels=1, out_channels=1, num_embeds_ada_norm=3
    )
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model.eval()


class Images:
    """As much of a task as is needed."""

    shape, device = (1, 4, 4), "cpu"


def outputs(model, labels):
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).expand(len(labels), -1, -1, -1)
    with torch.no_grad():
        return model(images, timestep=torch.full((len(labels),), 7), class_labels=torch.tensor(labels)).sample


@pytest.mark.parametrize("label_init", ["null", "mean"])
def test_with_classes(dit, label_init):
    wider = with_classes(dit, [2, 0], 2, label_init).eval()
    assert wider.config.num_embeds_ada_norm == 4
    expected = outputs(dit, [2, 0, 3])
    torch.testing.assert_close(outputs(wider, [0, 1, 4]), expected)
    new = outputs(wider, [2, 3])
    torch.testing.assert_close(new[0], new[1])
    assert torch.allclose(new[0], expected[2]) == (label_init == "null")
    assert dit.config.num_embeds_ada_norm == 3 and wider.proj_out_1.weight is not dit.proj_out_1.weight


@pytest.mark.parametrize("way", ["lora", "pissa", "oft"])
@pytest.mark.parametrize("wanted", [500, 2000])
def test_adapters_of_a_wanted_size(dit, way, wanted):
    expected = outputs(dit, [0, 1])
    adapted = add_adapter(with_classes(dit, range(3)), way, wanted, seed=0).eval()
    assert 1 / 2 < count_parameters(adapted, trainable=True) / wanted < 2
    torch.testing.assert_close(outputs(adapted, [0, 1]), expected, atol=1e-4, rtol=1e-4)
    plain = count_parameters(dit)
    assert count_parameters(adapted.merge_and_unload()) == plain


def test_adapters_are_drawn_from_the_seed(dit):
    one, same, other = (add_adapter(with_classes(dit, range(3)), "lora", 900, seed=seed) for seed in (1, 1, 2))
    first, second, third = (dict(model.named_parameters()) for model in (one, same, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_flops_of_a_dense_and_of_a_factored_model(dit):
    """Of the linear layers of blocks, rank / full rank; the rest is the same."""
    learngene = Learngene.condense(dit, KINDConfig(mode="generate", num_learngene=4, tailors_per_class=1))
    counts = [count_flops(learngene.descend(classes=classes), Images()) for classes in ([], [0], [0, 1])]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
    tokens, width, layers = 4, 16, 2
    shared, apart = (  # q, k and v have one V, whose product with their input may be taken once, or once for each
        layers * 2 * width * (tokens * (v + 3 + (1 + 1) + (1 + 4) + (4 + 1)) + (1 + 6)) for v in (1, 3)
    )
    assert shared <= counts[1] - counts[0] <= apart  # adaLN: once an image
    assert counts[0] < count_flops(dit, Images())


def test_sigma_has_a_rate_of_its_own(dit):
    learngene = Learngene.condense(dit, KINDConfig(mode="generate", num_learngene=4, tailors_per_class=1))
    model = learngene.descend(classes=[], num_new_classes=2)
    rest, sigma = sigma_groups(model, 0.1, 0.2)
    assert (rest["lr"], sigma["lr"]) == (0.1, 0.2)
    assert sum(p.numel() for p in sigma["params"]) == 2 * 5 * 2  # tailors x groups x layers
    assert all(not p.any() for p in sigma["params"])
    trainable = count_parameters(model, trainable=True)
    assert sum(p.numel() for group in (rest, sigma) for p in group["params"]) == trainable


def test_tables_and_curves_of_several_runs():
    runs = [[{"way": "a", "n": 3, "loss": 1.0}], [{"way": "a", "n": 3, "loss": 2.0}]]
    assert mean_rows(runs) == [{"way": "a", "n": 3, "loss": "1.500 ± 0.500"}]
    panels = [{"p": {"s": [(0, 1.0), (5, 3.0)]}}, {"p": {"s": [(0, 2.0), (5, 3.0)]}}]
    assert mean_curves(panels) == {"p": {"s": [(0, 1.5), (5, 3.0)]}}
