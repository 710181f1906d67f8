# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter`: the sum of what adapters do, as one adapter."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from diffusers_learngene import FINEConfig, KINDConfig, WAVEConfig, class_gate
from diffusers_learngene.adapters import add_adapter, add_weighted_adapter
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from diffusers_learngene.tuners.scalers import adapted_layers
from models import MODELS
from tuners.conftest import TAILORED


# To float32; the sum of two adapters adds in another order than one does.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SMALL = {
    WAVEConfig: {"template_size": 4, "num_templates": 3},
    FINEConfig: {"r": 3},
    TAILORED: {"num_learngene": 2, "tailors_per_class": 3},
}


def with_adapters(adder, *configs, name="dit"):
    """A model with adapters "a", "b", ... of these fields."""
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, adder(**configs[0]), adapter_name="a")
    for adapter, fields in zip("bc", configs[1:], strict=False):
        tiny.model.add_adapter(adapter, adder(**fields))
    return tiny


def deltas(model, adapter):
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LearngeneLayer)]
    return {name: layer.get_delta_weight(adapter) for name, layer in layers if adapter in layer.scaling}


def check_sum(model, adapters, weights, name="sum"):
    """The adapter is the weighted sum of the others in every layer that one of them has."""
    expected = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, delta in deltas(model, adapter).items():
            expected[key] = expected.get(key, 0) + weight * delta
    found = deltas(model, name)
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        torch.testing.assert_close(found[key], delta, **CLOSE)


def test_one_adapter_with_weight_one_is_the_identity(method):
    """PEFT issue 3761. The very same tensors, so that nothing is lost however often it is done."""
    tiny = with_adapters(method, {})
    tiny.model.add_weighted_adapter(["a"], [1.0], "sum")
    output = tiny()
    assert tiny.model.active_adapters == ["a"]
    mine, theirs = (
        {k.replace(f".{a}.", "."): p for k, p in tiny.model.named_parameters() if f".{a}." in k} for a in ("a", "sum")
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(theirs[key], mine[key]) for key in mine)
    tiny.model.set_adapter("sum")
    assert torch.equal(tiny(), output)


@pytest.mark.parametrize("name", ["dit", "conv2d", "conv1d"])
def test_one_bank(name, method, tmp_path):
    """The same bank under two names, trained apart: the sum has no more components than each."""
    tiny = with_adapters(method, {}, {}, name=name)
    with torch.no_grad():
        for layer in adapted_layers(tiny.model, "b").values():
            for mine, theirs in zip(layer.bank("b").parameters(), layer.bank("a").parameters(), strict=True):
                mine.copy_(theirs)
    tiny.model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    check_sum(tiny.model, ["a", "b"], [0.7, -0.4])
    for layer in adapted_layers(tiny.model, "sum").values():
        sizes = [[p.shape for p in layer.bank(adapter).parameters()] for adapter in ("a", "sum")]
        assert sizes[0] == sizes[1]


OTHERS = {
    "same layers": [{}, {}],
    "other layers": [{"layers_to_transform": [0, 1]}, {"layers_to_transform": [1, 2]}],
    "other roles": [{"target_modules": ["to_q", "ff.net.2"]}, {"target_modules": ["to_q", "to_k"]}],
    "fused into apart": [{"share_qkv": False}, {}],
    "apart into fused": [{}, {"share_qkv": False, "exclude_modules": ["to_v"]}],
    "three": [{"target_modules": ["to_v"], "layers_to_transform": 1}, {}, {"exclude_modules": ["to_out.0"]}],
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("config_cls", SMALL, ids=["wave", "fine", "kind"])
def test_several_banks(case, config_cls, tmp_path):
    """Components side by side, in layers that any of them has; the file loads like any other."""
    small = SMALL[config_cls]
    tiny = with_adapters(lambda **f: config_cls(init_weights=False, **small, **f), *OTHERS[case])
    adapters, weights = ["a", "b", "c"][: len(OTHERS[case])], [0.5, -1.5, 2.0][: len(OTHERS[case])]
    for layer in adapted_layers(tiny.model, "b").values():
        layer.set_scale("b", 0.3)
    tiny.model.add_weighted_adapter(adapters, weights, "sum")
    check_sum(tiny.model, adapters, weights)
    tiny.model.set_adapter("sum")
    output = tiny()
    tiny.model.save_pretrained(tmp_path, selected_adapters=["sum"])
    other = MODELS["dit"]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path / "sum")
    torch.testing.assert_close(other(), output, **CLOSE)


def test_ranks_add_up_beyond_the_side():
    tiny = with_adapters(FINEConfig, {"init_weights": False}, {"init_weights": False})
    tiny.model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert set(tiny.model.peft_config["sum"].group_ranks.values()) == {32}
    check_sum(tiny.model, ["a", "b"], [1.0, 1.0])


def test_an_adapter_twice():
    tiny = with_adapters(FINEConfig, {"init_weights": False})
    tiny.model.add_weighted_adapter(["a", "a"], [1.0, 0.5], "sum")
    check_sum(tiny.model, ["a"], [1.5])


def test_without_a_peft_model(adder):
    tiny, plain = MODELS["dit"](), MODELS["dit"]()()
    for name in ("a", "b"):
        add_adapter(tiny.model, adder(), name)
    assert add_weighted_adapter(tiny.model, ["b"], [0.0], "none") is tiny.model
    torch.testing.assert_close(tiny(), plain, **CLOSE)
    add_weighted_adapter(tiny.model, ["a", "none"], [0.5, 3.0], "halved")
    check_sum(tiny.model, ["a"], [0.5], "halved")


def test_generated_weights(generator):
    """A mixture of two models."""
    tiny = with_adapters(generator, {"target_modules": ["to_q", "to_k"]}, {"target_modules": ["to_q", "to_k"]})
    tiny.model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    check_sum(tiny.model, ["a", "b"], [0.25, 0.75])
    tiny.model.set_adapter("sum")
    assert tiny().isfinite().all()


REFUSED = [
    ([{}], [], [], "must be names and as many finite numbers"),
    ([{}], ["a"], [1.0, 2.0], "must be names and as many finite numbers"),
    ([{}], ["a"], [float("nan")], "must be names and as many finite numbers"),
    ([{}], ["a", "x"], [1.0, 1.0], "There is no adapter 'x', only \\['a'\\]"),
    ([{}, {"mode": "generate"}], ["a", "b"], [1.0, 1.0], "Only adapters of one method and mode add up"),
    (
        [{"mode": "generate", "target_modules": ["to_q"]}, {"mode": "generate", "target_modules": ["to_k"]}],
        ["a", "b"],
        [1.0, 1.0],
        "not all generate the same layers",
    ),
    ([{"modules_to_save": ["proj_out_2"]}], ["a"], [1.0], "'a' has trained bias, modules_to_save or tensors_to_save"),
    ([{"tensors_to_save": ["proj_out_2.bias"]}], ["a"], [1.0], "modules_to_save or tensors_to_save"),
    ([{"bias": "learngene_only"}], ["a"], [1.0], "'a' has trained bias, modules_to_save or tensors_to_save"),
]


@pytest.mark.parametrize(("configs", "adapters", "weights", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(configs, adapters, weights, message):
    model = with_adapters(FINEConfig, *configs).model
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, "sum")
    assert set(model.state_dict()) == before and "sum" not in model.peft_config


def test_classes_that_are_assigned_differently():
    """Tailors of one assignment stand side by side, each kind in its place; of two, they do not."""
    groups = {"class_groups": [[3], [1, 2]], "init_weights": False}
    same = with_adapters(KINDConfig, {"num_learngene": 2, **groups}, {"tailors_per_class": 2, **groups}).model
    same.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum")
    assert set(map(tuple, same.peft_config["sum"].group_sizes.values())) == {(10, 6)}
    for label in (1, 3, 10):
        with class_gate(same, label):
            check_sum(same, ["a", "b"], [0.5, 2.0])
    other = with_adapters(KINDConfig, groups, {**groups, "class_groups": [[3], [1, 4]]}).model
    with pytest.raises(ValueError, match="assign the same classes to tailors in the same way"):
        other.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_refused_names_scales_and_sizes():
    model = with_adapters(FINEConfig, {}).model
    with pytest.raises(ValueError, match="There is an adapter 'a' already"):
        model.add_weighted_adapter(["a"], [1.0], "a")
    model.transformer_blocks[0].attn1.to_q.set_scale("a", 2.0)
    with pytest.raises(ValueError, match="share a scaler are scaled differently"):
        model.add_weighted_adapter(["a"], [1.0], "sum")
    model = with_adapters(WAVEConfig, {"template_size": 4}, {"template_size": (4, 2)}).model
    with pytest.raises(ValueError, match="components of different sizes"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
