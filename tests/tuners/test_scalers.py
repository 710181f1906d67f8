# SPDX-License-Identifier: Apache-2.0
"""Several scalers over one bank: taken out, put back, trained alone."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from diffusers_learngene import FINEConfig, WAVEConfig, freeze_bank_, get_scalers, set_scalers_
from diffusers_learngene.adapters import add_adapter
from models import MODELS, run
from tuners.conftest import METHODS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def adapted(config, name="dit"):
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


def test_switching(method, tmp_path):
    """Scalers that go through a file and into another copy of the model make it the same."""
    tiny = adapted(method())
    first, before = tiny(), get_scalers(tiny.model)
    save_file(before, tmp_path / "task.safetensors")
    second = {name: scaler * 1.5 for name, scaler in before.items()}
    assert set_scalers_(tiny.model, second) is tiny.model
    changed = tiny()
    assert not torch.allclose(changed, first, atol=1e-3)
    assert all(torch.equal(scaler, second[name]) for name, scaler in get_scalers(tiny.model).items())
    set_scalers_(tiny.model, load_file(tmp_path / "task.safetensors"))
    assert torch.equal(tiny(), first)


def test_one_a_layer_or_one_a_matrix():
    names = get_scalers(adapted(FINEConfig()).model)
    assert len(names) == 3 * 5 and "transformer_blocks.0.attn1.to_q" in names
    assert len(get_scalers(adapted(WAVEConfig()).model)) == 3 * 7


def test_names_are_the_plain_model_s(method):
    """Wrapped, injected and compiled, with adapters of any name."""
    wrapped, injected = adapted(method()), MODELS["dit"]()
    add_adapter(injected.model, method(), "other")
    scalers = get_scalers(wrapped.model)
    set_scalers_(injected.model, scalers, "other")
    assert scalers.keys() == get_scalers(injected.model, "other").keys()
    assert scalers.keys() == get_scalers(torch.compile(wrapped.model, backend="eager")).keys()


@pytest.mark.parametrize("kind", ["wave-odd", "fine-odd", "fine-generate-wide"])
def test_no_recompilation(kind):
    tiny = adapted(METHODS[kind](), "mlp")
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled, tiny.inputs)
        for factor in (2.0, 0.0, -1.0):
            set_scalers_(compiled, {name: factor * s for name, s in get_scalers(compiled).items()})
            torch.testing.assert_close(run(compiled, tiny.inputs), tiny(), **CLOSE)


def test_training_scalers_alone(method):
    """The bank stays frozen whatever PEFT activates in between, and learns again in a new adapter."""
    tiny = adapted(method())
    assert freeze_bank_(tiny.model) is tiny.model
    tiny.model.add_adapter("second", method())
    for name in ("second", "default"):
        tiny.model.set_adapter(name)
    with tiny.model.disable_adapter():
        pass
    trained = [name for name, p in tiny.model.named_parameters() if p.requires_grad]
    assert len(trained) == len(get_scalers(tiny.model)) and not any("_bank" in name for name in trained)
    tiny().square().mean().backward()
    assert all(p.grad is None for name, p in tiny.model.named_parameters() if "_bank" in name)
    tiny.model.set_adapter("second")
    assert any("_bank.second" in name for name, p in tiny.model.named_parameters() if p.requires_grad)


WRONG = {
    "missing": (lambda s, name: s.pop(name), "missing \\['blocks.1.up'\\], unexpected \\[\\]"),
    "unexpected": (lambda s, name: s.update(x=s[name]), "unexpected \\['x'\\]"),
    "shape": (lambda s, name: s.update({name: s[name][1:]}), "blocks.1.up has shape"),
    "nan": (lambda s, name: s[name].view(-1)[:1].fill_(torch.nan), "blocks.1.up holds values"),
    "integers": (lambda s, name: s.update({name: s[name].int()}), "blocks.1.up holds values"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["wave", "fine"])
def test_wrong_scalers(case, kind):
    tiny = adapted(METHODS[kind](), "mlp")
    output, scalers = tiny(), {name: 2 * scaler for name, scaler in get_scalers(tiny.model).items()}
    change, message = WRONG[case]
    change(scalers, "blocks.1.up")
    with pytest.raises(ValueError, match=f"The scalers.*{message}"):
        set_scalers_(tiny.model, scalers)
    assert torch.equal(tiny(), output)


def test_adapters_that_are_not_there():
    for call in (get_scalers, freeze_bank_, lambda model, name: set_scalers_(model, {}, name)):
        with pytest.raises(ValueError, match="No layer has a learngene adapter 'other'"):
            call(adapted(FINEConfig()).model, "other")
