# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: active together or in turn, added, merged and deleted in any order."""

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model

from diffusers_learngene import FINEConfig, WAVEConfig
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from models import MODELS
from tuners.conftest import TAILORED


# Other sizes, other layers, layers in common, groups that begin elsewhere.
CONFIGS = {
    "x": {},
    "y": {"target_modules": ["to_q", "ff.net.2"]},
    "z": {"share_qkv": False, "layers_to_transform": [1, 2]},
}
SIZES = {
    WAVEConfig: {"template_size": (3, 5), "num_templates": 4},
    FINEConfig: {"r": 5},
    TAILORED: {"num_learngene": 2, "tailors_per_class": 3},
}
# PEFT warns where some layers have nothing to merge or unmerge.
pytestmark = pytest.mark.filterwarnings("ignore:Already", "ignore:All adapters are already merged")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=SIZES, ids=["wave", "fine", "kind"])
def make(request):
    """Makes the config of this name."""
    sizes = {"y": SIZES[request.param]}
    return lambda name: request.param(init_weights=False, **CONFIGS[name], **sizes.get(name, {}))


def single(make, name):
    tiny = MODELS["dit"]()
    torch.manual_seed(ord(name))
    tiny.model = get_peft_model(tiny.model, make(name), adapter_name=name)
    return tiny


def together(make, names):
    """A model with the adapters that `single` makes, added in this order."""
    tiny = single(make, names[0])
    for name in names[1:]:
        torch.manual_seed(ord(name))
        tiny.model.add_adapter(name, make(name))
    return tiny


@pytest.mark.parametrize("name", ["", "a.b", "weight", "u", "0", "transformer_blocks", "base_layer", "learngene_x"])
def test_names_that_files_cannot_tell_from_others(name, make):
    name = name.replace("learngene_x", f"learngene_{make('x').peft_type.split('_')[1].lower()}_bank")
    tiny = single(make, "x")
    before, output = tiny.model.state_dict(), tiny()
    with pytest.raises(ValueError, match=f"adapter_name='{name}' cannot be told from"):
        tiny.model.add_adapter(name, make("y"))
    assert tiny.model.state_dict().keys() == before.keys()
    assert torch.equal(tiny(), output)


def weights(model, name):
    """Every tensor of an adapter, by its name in the model."""
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key}


@pytest.mark.parametrize("order", itertools.permutations("xyz"), ids="".join)
def test_one_at_a_time(order, make):
    """In whatever order they came, each does what it does alone."""
    tiny = together(make, order)
    for name in reversed(order):
        tiny.model.set_adapter(name)
        expected = single(make, name)
        assert weights(tiny.model, name).keys() == weights(expected.model, name).keys()
        torch.testing.assert_close(tiny(), expected(), **CLOSE)
        trained = {key for key, p in tiny.model.named_parameters() if p.requires_grad}
        assert trained == weights(tiny.model, name).keys()


@pytest.mark.parametrize("order", itertools.permutations("xyz"), ids="".join)
def test_deleting_leaves_the_others_as_they_are(order, make):
    tiny = together(make, "xyz")
    kept = {name: weights(tiny.model, name) for name in "xyz"}
    for deleted, *rest in (order, order[1:]):
        tiny.model.set_adapter(rest[0])
        tiny.model.delete_adapter(deleted)
        assert not weights(tiny.model, deleted)
        for name in rest:
            found = weights(tiny.model, name)
            assert found.keys() == kept[name].keys()
            assert all(torch.equal(found[key], kept[name][key]) for key in found)
            tiny.model.set_adapter(name)
            torch.testing.assert_close(tiny(), single(make, name)(), **CLOSE)
    torch.manual_seed(ord(order[0]))
    tiny.model.add_adapter(order[0], make(order[0]))
    tiny.model.set_adapter(order[0])
    torch.testing.assert_close(tiny(), single(make, order[0])(), **CLOSE)


@pytest.mark.parametrize("names", ["xy", "xz", "zy", "zxy"])
def test_active_together(names, make):
    """Their deltas add up, merged or not, together or one by one."""
    tiny, plain = together(make, "xyz"), MODELS["dit"]()
    tiny.model.base_model.set_adapter(list(names))
    output = tiny()
    with torch.no_grad():
        for name in names:
            for key, layer in single(make, name).model.named_modules():
                if isinstance(layer, LearngeneLayer):
                    base = plain.model.get_submodule(key.removeprefix("base_model.model."))
                    base.weight += layer.get_delta_weight(name)
    torch.testing.assert_close(output, plain(), **CLOSE)
    tiny.model.merge_adapter()
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.unmerge_adapter()
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.set_adapter(names[0])
    tiny.model.merge_adapter()
    torch.testing.assert_close(tiny(), single(make, names[0])(), **CLOSE)
    for name in names[1:]:
        tiny.model.merge_adapter(adapter_names=[name])
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.unmerge_adapter()
    tiny.model = tiny.model.merge_and_unload(adapter_names=list(names))
    torch.testing.assert_close(tiny(), output, **CLOSE)


def test_disabling(adder):
    tiny = MODELS["dit"]()
    expected = tiny()
    tiny.model = get_peft_model(tiny.model, adder())
    output = tiny()
    with tiny.model.disable_adapter():
        torch.testing.assert_close(tiny(), expected, **CLOSE)
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.merge_adapter()
    with tiny.model.disable_adapter():  # as in PEFT, this unmerges
        torch.testing.assert_close(tiny(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiny(), output, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiny.model.unload()(**tiny.inputs).sample, expected, rtol=1e-3, atol=1e-4)


def test_saving_one_of_many(make, tmp_path):
    tiny = together(make, "xyz")
    tiny.model.save_pretrained(tmp_path)
    other = MODELS["dit"]()
    other.model = PeftModel.from_pretrained(other.model, tmp_path / "z", adapter_name="first")
    other.model.load_adapter(tmp_path / "x", "second")
    for mine, theirs in (("first", "z"), ("second", "x")):
        other.model.set_adapter(mine)
        tiny.model.set_adapter(theirs)
        assert torch.equal(other(), tiny())


def test_scale_is_linear(adder):
    tiny = MODELS["mlp"]()
    expected = tiny()
    tiny.model = get_peft_model(tiny.model, adder(target_modules=["blocks.2.down"]))
    full = tiny()
    layer = tiny.model.base_model.model.blocks[2].down
    for scale in (0.0, 0.3, -2.0):
        layer.set_scale("default", scale)
        torch.testing.assert_close(tiny() - expected, scale * (full - expected), **CLOSE)
    layer.unscale_layer()
    layer.scale_layer(0.5)
    torch.testing.assert_close(tiny() - expected, 0.5 * (full - expected), **CLOSE)
    layer.unscale_layer(0.5)
    layer.set_scale("absent", 3)
    torch.testing.assert_close(tiny(), full, **CLOSE)
    layer.merge()
    layer.set_scale("default", 7)  # what was merged is what is taken out
    layer.unmerge()
    layer.set_scale("default", 0)
    torch.testing.assert_close(tiny(), expected, **CLOSE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_finds_broken_weights(method, value):
    tiny = MODELS["mlp"]()
    tiny.model = get_peft_model(tiny.model, method())
    with torch.no_grad():
        next(p for p in tiny.model.parameters() if p.requires_grad).view(-1)[0] = value
    before = {name: p.clone() for name, p in tiny.model.named_parameters() if "base_layer" in name}
    for call in (tiny.model.merge_adapter, tiny.model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
            call(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in tiny.model.named_parameters() if name in before)
