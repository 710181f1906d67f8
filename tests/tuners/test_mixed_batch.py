# SPDX-License-Identifier: Apache-2.0
"""`adapter_names=`: every sample of a batch with an adapter of its own, as LoRA has it."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from diffusers_learngene import KINDConfig, WAVEConfig, class_gate
from models import CLASS, MODELS, gate, ids, output_of, run
from tuners.conftest import ADDERS, METHODS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = ["one", "__base__", "two", "one"]
# Every model with one kind of adapter of each method, and every kind on three models.
PAIRS = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if model in ("dit", "gpt2", "conv2d") or method in ("wave-odd", "fine-generate-wide", "kind-tailored")
]


def four(name):
    """A model with four samples."""
    tiny = MODELS[name]()
    tiny.inputs = {
        key: torch.cat([value, value.flip(0)]) if isinstance(value, Tensor) and len(value) == 2 else value
        for key, value in tiny.inputs.items()
    }
    return tiny


def adapted(tiny, make, names=("one", "two")):
    torch.manual_seed(0)
    tiny.model = get_peft_model(tiny.model, make(), adapter_name=names[0])
    for name in names[1:]:
        tiny.model.add_adapter(name, make(exclude_modules=["up", "to_q", "c_fc"]))
    return tiny


def mixed(tiny, names):
    return run(tiny.model, tiny.inputs | {"adapter_names": names})


def one_by_one(tiny, name):
    """The whole batch with one adapter."""
    if name == "__base__":
        with tiny.model.disable_adapter():
            return tiny()
    tiny.model.set_adapter(name)
    return tiny()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@torch.no_grad()
def test_each_sample_has_its_own(name, kind, factored):
    adder = kind in ADDERS
    plain, tiny = four(name)(), four(name)
    if adder:
        tiny, names = adapted(tiny, METHODS[kind]), NAMES
    else:  # where weights are generated, every sample needs an adapter that generates, in all layers
        torch.manual_seed(0)
        tiny.model = get_peft_model(tiny.model, METHODS[kind](), adapter_name="one")
        tiny.model.add_adapter("two", METHODS[kind]())
        names = ["one", "two", "two", "one"]
    expected = {key: one_by_one(tiny, key) for key in names}
    tiny.model.set_adapter("two")  # is of no account
    output = mixed(tiny, names)
    for row, key in enumerate(names):
        torch.testing.assert_close(output[row], expected[key][row], **CLOSE)
    if adder:
        torch.testing.assert_close(output[1], plain[1], **CLOSE)
    assert not torch.allclose(output[0], expected["two"][0], atol=1e-4)
    torch.testing.assert_close(mixed(tiny, ["two"] * 4), expected["two"], **CLOSE)  # nothing of the first call is left
    torch.testing.assert_close(tiny(), one_by_one(tiny, "two"), **CLOSE)


@torch.no_grad()
def test_scales_and_a_layer_that_is_trained_in_full():
    tiny = adapted(four("mlp"), lambda **fields: WAVEConfig(init_weights=False, modules_to_save=["head"], **fields))
    for module in tiny.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("two", 0.3)
    for key, copy in tiny.model.base_model.model.head.modules_to_save.items():
        copy.bias.fill_({"one": 1.0, "two": 2.0}[key])
    expected = {key: one_by_one(tiny, key) for key in NAMES}
    output = mixed(tiny, NAMES)
    for row, key in enumerate(NAMES):
        torch.testing.assert_close(output[row], expected[key][row], **CLOSE)


@torch.no_grad()
def test_each_adapter_knows_its_own_classes():
    """Labels of one adapter's samples need not be known to the other; guided batches have rows of the null class."""
    tiny = four("dit")
    sizes = {"init_weights": False, "num_learngene": 2, "tailors_per_class": 3}
    tiny.model = get_peft_model(tiny.model, KINDConfig(class_groups=[[1], [7]], **sizes), adapter_name="one")
    tiny.model.add_adapter("two", KINDConfig(class_groups=[[3]], **sizes))
    labels = torch.tensor([1, 5, 3, 7])

    def output(adapter, label, row):
        tiny.model.set_adapter(adapter)
        return output_of(tiny.model(**tiny.inputs | {"class_labels": torch.full((4,), label)}))[row]

    found = output_of(tiny.model(**tiny.inputs | {"class_labels": labels, "adapter_names": NAMES}))
    for row in (0, 2, 3):
        torch.testing.assert_close(found[row], output(NAMES[row], int(labels[row]), row), **CLOSE)
    with pytest.raises(ValueError, match=r"does not know the classes \[3, 5\]"):
        tiny.model(**tiny.inputs | {"class_labels": labels, "adapter_names": ["one"] * 4})

    names = ["one", "two", "two", "one"]
    tiny.inputs["class_labels"] = torch.tensor([10, 10, 3, 1])
    with class_gate(tiny.model, [3, 1], guidance=True):
        guided = output_of(tiny.model(**tiny.inputs, adapter_names=names))
    torch.testing.assert_close(guided, output_of(tiny.model(**tiny.inputs, adapter_names=names)), **CLOSE)
    with class_gate(tiny.model, [3, 1, 1]), pytest.raises(ValueError, match="gate has 3 rows, .* has 4 samples"):
        tiny.model(**tiny.inputs, adapter_names=names)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generating_text(num_beams):
    """Beams repeat the samples, after an encoder that sees each once."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config).eval(), WAVEConfig(init_weights=False), "one")
    model.add_adapter("two", WAVEConfig(init_weights=False))
    tokens, length = ids(40, 4, 6), {"min_new_tokens": 5, "max_new_tokens": 5, "num_beams": num_beams}
    with torch.no_grad():  # so that adapters make a difference to the words
        model.get_base_model().lm_head.weight.normal_()
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=tokens, **length)
    with model.disable_adapter():
        expected["__base__"] = model.generate(input_ids=tokens, **length)
    found = model.generate(input_ids=tokens, adapter_names=NAMES, **length)
    assert all(torch.equal(found[row], expected[name][row]) for row, name in enumerate(NAMES))
    assert not torch.equal(expected["one"], expected["two"])


def test_refused_as_lora_refuses(adder):
    """With its messages; afterwards the model is as it was."""
    tiny = adapted(four("dit"), adder)
    output = tiny()
    for names, message in (
        (["one"], "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 4"),
        (["one", "thre", "two", "fuor"], r"non-existing adapter\(s\): fuor, thre"),
        ("onetwo", "must be a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed(tiny, names)
    torch.testing.assert_close(tiny(), output, **CLOSE)
    tiny.model.train()
    with pytest.raises(ValueError, match="`adapter_names` when the model is in training mode"):
        mixed(tiny, NAMES)
    tiny.model.eval()
    with gate(tiny.model, CLASS):
        tiny.model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        mixed(tiny, NAMES)


@pytest.mark.parametrize("fields", [{"bias": "learngene_only"}, {"tensors_to_save": ["blocks.*.norm.bias"]}], ids=str)
def test_what_acts_on_every_sample_is_refused(fields):
    """Biases of the model itself are those of one adapter."""
    tiny = four("mlp")
    tiny.model = get_peft_model(tiny.model, WAVEConfig(**fields), adapter_name="one")
    tiny.model.add_adapter("two", WAVEConfig())
    with pytest.raises(ValueError, match="'one' has trained biases or tensors_to_save .* use set_adapter"):
        mixed(tiny, NAMES)
    assert torch.equal(mixed(tiny, ["one"] * 4), tiny())


def test_a_sample_without_weights():
    """Of a generated weight, nothing is left for a sample that does not generate it."""
    tiny = four("mlp")
    tiny.model = get_peft_model(tiny.model, WAVEConfig(mode="generate"), adapter_name="one")
    with pytest.raises(RuntimeError, match="has no weight of its own"):
        mixed(tiny, ["one", "__base__", "one", "one"])
