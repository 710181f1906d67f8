# SPDX-License-Identifier: Apache-2.0
"""KIND's gate: whatever says the classes, every sample is computed with the dense weights W(c) of its own class.

The reference knows nothing of gates: a plain model a sample, whose weights are put together here from U, sigma and V.
"""

import pickle
import warnings
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffusers_learngene import KINDConfig, class_gate
from diffusers_learngene.adapters import add_adapter, load_adapter, save_adapter
from diffusers_learngene.anatomy.dit import disable_label_dropout_
from diffusers_learngene.tuners.kind import KINDLayer
from diffusers_learngene.tuners.kind.gate import STATE, Gate, _checkpoint
from models import MODELS, output_of


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NULL = 10  # of the tiny DiT

# Who opens what. Unit by unit, and again: `opened` says it in plain Python.
ASSIGNMENTS = {
    "every class": {"tailors_per_class": 2},
    "groups": {"class_groups": {"odd": [1, 3, 5, 7, 9], "small": [1, 2, 3]}, "tailors_per_class": 3},
    "matrix": {"class_gate": [[int(label % (tailor + 2) == 0) for tailor in range(4)] for label in range(10)]},
}


def opened(config, label, num_tailors):
    """Zeros and ones of a class for the tailors of a layer."""
    if label == NULL:
        return [0.0] * num_tailors
    if config.class_gate is not None:
        units = config.class_gate[label]
    elif config.class_groups is not None:
        units = [int(label in group) for group in config.class_groups.values()]
    else:
        units = [int(label == unit) for unit in range(10)]
    return [float(units[tailor % len(units)]) for tailor in range(num_tailors)]


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDLayer)}


def delta(layer, adapter, config, label):
    """U diag(sigma * g(c)) V^T of one layer, from its tensors."""
    bank, sigma = layer.bank(adapter), layer.scaler(adapter).weight
    gate = torch.tensor([1.0] * bank.num_learngene + opened(config, label, bank.num_tailors)).to(sigma)
    rows = slice(layer.offsets[adapter], layer.offsets[adapter] + layer.out_features)
    return bank.u[rows] @ torch.diag(sigma * gate) @ bank.v.T


def dense(name, model, classes):
    """Plain models with W(c): one for every entry of `classes`, which maps adapters to the sample's class."""
    found = []
    for labels in classes:
        plain = MODELS[name]().model
        state = dict(plain.named_parameters())
        for key, layer in layers(model).items():
            weight = state[key.removeprefix("base_model.model.").replace("_orig_mod.", "") + ".weight"]
            for adapter, label in labels.items():
                if adapter in layer.scaling:
                    change = delta(layer, adapter, model.peft_config[adapter], label)
                    change = change.T if name == "conv1d" else change.reshape(weight.shape)
                    added = model.peft_config[adapter].mode == "add"
                    weight = weight + change if added else change
            state[key.removeprefix("base_model.model.") + ".weight"] = weight
        found.append((plain, state))
    return found


def sample_of(inputs, i):
    return {key: value if key in ("img_ids", "txt_ids") else value[i : i + 1] for key, value in inputs.items()}


def expected(name, model, inputs, classes):
    """Sample by sample through the plain model of its class; gradients flow to the adapter."""
    outputs = []
    for i, (plain, state) in enumerate(dense(name, model, classes)):
        outputs.append(output_of(torch.func.functional_call(plain, state, (), sample_of(inputs, i))))
    return torch.cat(outputs)


def adapted(name="dit", assignment="groups", **fields):
    tiny = MODELS[name]()
    torch.manual_seed(1)
    config = {"init_weights": False, "num_learngene": 3, **ASSIGNMENTS[assignment], **fields}
    if name != "dit" and "class_gate" not in config:
        config["num_classes"] = 10
    tiny.model = get_peft_model(tiny.model, KINDConfig(**config))
    return tiny


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(tiny, gate=None, **inputs):
    with nullcontext() if gate is None else gate:
        return output_of(tiny.model(**{**tiny.inputs, **inputs}))


def check(name, tiny, classes, found):
    """Output, and the gradients that one backward pass gives."""
    reference = expected(name, tiny.model, tiny.inputs, [{"default": label} for label in classes])
    torch.testing.assert_close(found, reference, **CLOSE)
    mine = torch.autograd.grad(found.square().mean(), trained(tiny.model), allow_unused=True)
    theirs = torch.autograd.grad(reference.square().mean(), trained(tiny.model), allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **CLOSE)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def is_clean(model):
    """Nothing of a forward pass is left behind."""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    bound = [function for function in functions if getattr(function, "func", None) is _checkpoint]
    return not bound and not any(layer.gate.stack for layer in layers(model).values())


# The model's own labels


@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("classes", [[1, 7], [NULL, 3], [3, 3]], ids=str)
def test_labels(classes, assignment, mode):
    tiny = adapted(assignment=assignment, mode=mode)
    tiny.inputs["class_labels"] = torch.tensor(classes)
    check("dit", tiny, classes, ours(tiny))
    assert is_clean(tiny.model)
    positional = [tiny.inputs[key] for key in ("hidden_states", "timestep", "class_labels")]
    assert torch.equal(output_of(tiny.model(*positional)), ours(tiny))


def test_classes_differ():
    """So that no comparison here passes because the gate does nothing."""
    tiny = adapted(mode="generate")
    with class_gate(tiny.model, [2, 2]):
        two = ours(tiny)
    assert (two - ours(tiny, class_gate(tiny.model, [5, 5]))).abs().max() > 1e-2


# By hand


@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "vit", "conv2d", "conv1d"])
def test_ids(name, mode):
    """On any model; on a DiT they win over its labels."""
    tiny = adapted(name, mode=mode)
    check(name, tiny, [2, 9], ours(tiny, class_gate(tiny.model, torch.tensor([2, 9]))))
    assert is_clean(tiny.model)


@pytest.mark.parametrize("factored", [True, False])
def test_one_id(factored, monkeypatch):
    """A batch of any size, computed either way."""
    monkeypatch.setattr("diffusers_learngene.functional.fine.apply_is_cheaper", lambda *_: factored)
    tiny = adapted("conv2d")
    check("conv2d", tiny, [3, 3], ours(tiny, class_gate(tiny.model, 3)))


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_soft_weights(assignment):
    """W is linear in the gate, so that the weights' W is the weighted W(c); and the weights get gradients."""
    tiny = adapted("vit", assignment, mode="generate")
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = ours(tiny, class_gate(tiny.model, logits.softmax(-1)))
    plain, outputs = MODELS["vit"]().model, []
    for i, weights in enumerate(logits.softmax(-1)):
        state = dict(plain.named_parameters())
        for key, layer in layers(tiny.model).items():
            parts = [weights[c] * delta(layer, "default", tiny.model.peft_config["default"], c) for c in range(10)]
            state[key.removeprefix("base_model.model.") + ".weight"] = sum(parts)
        outputs.append(output_of(torch.func.functional_call(plain, state, (), sample_of(tiny.inputs, i))))
    torch.testing.assert_close(found, torch.cat(outputs), **CLOSE)
    mine, theirs = (torch.autograd.grad(y.square().mean(), logits)[0] for y in (found, torch.cat(outputs)))
    assert theirs.abs().max() > 1e-6
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_rows():
    """Each row stands for several samples, null rows first: [0 0 0 0, 3 3 9 9]."""
    tiny = adapted("sd3")
    tiny.inputs = {k: v.repeat(4, *(1 for _ in v.shape[1:])) for k, v in tiny.inputs.items()}
    gate = class_gate(tiny.model, [3, 9], num_images_per_prompt=2, guidance=True)
    check("sd3", tiny, [NULL] * 4 + [3, 3, 9, 9], ours(tiny, gate))
    for weights in ([3, 9], nn.functional.one_hot(torch.tensor([3, 9]), 10).float()):
        gate = class_gate(tiny.model, weights, num_images_per_prompt=2, guidance=True)
        assert torch.equal(ours(tiny, gate)[:4], ours(tiny, class_gate(tiny.model, [NULL] * 8))[:4])


def opened_in(layer):
    """A list that takes down what the first unit of a layer does, sample by sample, in every call."""
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._units("default", args[0])[:, 0].tolist()))
    return seen


def test_dit_pipeline():
    """It guides with label 1000, which comes after the classes."""
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    config = {**MODELS["dit"]().model.config, "num_embeds_ada_norm": 1000}
    model = add_adapter(DiTTransformer2DModel.from_config(config), KINDConfig(class_groups=[[207], [1, 360]]))
    assert model.peft_config["default"].num_classes == 1000
    seen = opened_in(model.transformer_blocks[0].attn1.to_q)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe([207, 360], num_inference_steps=1, output_type="latent")
    assert seen == [[True, False, False, False]]


def test_sd3_pipeline():
    """It puts the batch without a prompt first, and images of one prompt in a row (here, embeddings: that many)."""
    model = add_adapter(MODELS["sd3"]().model, KINDConfig(num_classes=10, class_groups=[[1, 2], [9]]))
    seen = opened_in(model.transformer_blocks[0].attn.to_q)
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    shapes = {"prompt_embeds": (4, 3, 12), "pooled_prompt_embeds": (4, 10)}
    embeds = {prefix + key: torch.zeros(shape) for prefix in ("", "negative_") for key, shape in shapes.items()}
    settings = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent", "height": 8, "width": 8}
    with class_gate(pipe.transformer, [2, 9], num_images_per_prompt=2, guidance=True):
        pipe(**embeds, **settings)
    assert seen == [[False] * 4 + [True, True, False, False]]


# Recomputation


def diffusers_switch(model, reentrant):
    model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant))


def transformers_switch(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


SWITCHES = {"diffusers": ("dit", diffusers_switch), "transformers": ("vit", transformers_switch)}


def test_label_dropout_behind_the_gate_is_said_once_and_only_in_training():
    tiny = adapted("dit")
    labels = torch.tensor([1, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(tiny, class_labels=labels)
    tiny.model.train()
    with pytest.warns(UserWarning, match=r"label dropout of its own.*disable_label_dropout_\(model\)"):
        ours(tiny, class_labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(tiny, class_labels=labels)
        other = adapted("dit")
        disable_label_dropout_(other.model.train())
        ours(other, class_labels=labels)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("host", SWITCHES)
def test_checkpointing(host, reentrant):
    """The backward pass recomputes with the gate of its forward, after others have come and gone."""
    name, switch = SWITCHES[host]
    tiny = adapted(name, mode="generate")
    disable_label_dropout_(tiny.model.train())
    next(iter(tiny.inputs.values())).requires_grad_()
    switch(tiny.model.base_model.model, reentrant)
    steps = [[1, 7], [9, 2]]

    def call(ids):
        if name == "vit":
            return ours(tiny, class_gate(tiny.model, ids))
        return ours(tiny, class_labels=torch.tensor(ids))

    def loss(outputs):
        return outputs[0].square().mean() + 3 * outputs[1].square().mean()

    found = [call(ids) for ids in steps]
    assert is_clean(tiny.model)
    with torch.no_grad():  # an evaluation in the middle of a step
        call([5, 5])
    loss(found).backward()
    mine = gradients(tiny.model)
    assert is_clean(tiny.model)
    tiny.model.zero_grad()
    reference = []
    for ids in steps:
        inputs = {**tiny.inputs, "class_labels": torch.tensor(ids)} if name == "dit" else tiny.inputs
        reference.append(expected(name, tiny.model, inputs, [{"default": label} for label in ids]))
    torch.testing.assert_close(found, reference, **CLOSE)
    loss(reference).backward()
    theirs = gradients(tiny.model)
    assert mine.keys() == theirs.keys() == {n for n, p in tiny.model.named_parameters() if p.requires_grad}
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, **CLOSE)


def test_checkpointing_by_other_means():
    """A block that recomputes by itself finds no gate, and says so; with the context open it does."""
    tiny = adapted("conv2d")
    block = tiny.model.base_model.model.blocks[1]
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    found = ours(tiny, class_gate(tiny.model, [2, 9]))
    with pytest.raises(RuntimeError, match="nothing says which class"):
        found.square().mean().backward()
    with class_gate(tiny.model, [2, 9]):
        check("conv2d", tiny, [2, 9], ours(tiny))


@pytest.mark.parametrize("how", ["whole", "block by block"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_compile(by_hand, how):
    """In one graph, fed by labels or by hand, for other classes as well; and the model's blocks alone."""
    tiny = adapted(mode="generate")
    eager = tiny.model
    torch._dynamo.reset()
    if how == "whole":
        tiny.model = torch.compile(eager, fullgraph=True, backend="aot_eager")
    else:
        for block in eager.base_model.model.transformer_blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for classes in ([1, 7], [NULL, 2]):
        ids = torch.tensor(classes)
        found = ours(tiny, class_gate(eager, ids) if by_hand else None, class_labels=ids)
        plain = MODELS["dit"]()
        plain.inputs["class_labels"], plain.model = ids, eager
        check("dit", plain, classes, found)
        assert is_clean(eager)
    with pytest.raises(RuntimeError, match="class labels that the KIND adapter does not know"):
        ours(tiny, class_gate(eager, [0, 1]) if by_hand else None, class_labels=torch.tensor([0, 1]))


# Several adapters


def test_two_adapters():
    """Each opens what its own assignment says of the class."""
    tiny = adapted(mode="generate")
    groups = {"last": [7, 8], "first": [0, 1, 2]}
    other = KINDConfig(init_weights=False, num_learngene=0, tailors_per_class=2, class_groups=groups)
    tiny.model.add_adapter("other", other)
    tiny.model.base_model.set_adapter(["default", "other"])
    labels = [{"default": label, "other": label} for label in (1, 7)]
    torch.testing.assert_close(ours(tiny), expected("dit", tiny.model, tiny.inputs, labels), **CLOSE)
    tiny.model.set_adapter("default")
    check("dit", tiny, [1, 7], ours(tiny))


def test_new_classes_leave_the_old_as_they_are():
    """Tailors of class 7 alone, over a frozen model: class 1 is the same to the bit, in one batch with class 7."""
    tiny = adapted(mode="generate")
    before = ours(tiny)
    sizes = {"num_learngene": 0, "tailors_per_class": 4}
    novel = KINDConfig(init_weights=False, **sizes, class_groups=[[7]], known_classes=[*range(10)])
    tiny.model.add_adapter("novel", novel)
    tiny.model.base_model.set_adapter(["default", "novel"])
    tiny.model.base_model.set_requires_grad("default", False)
    after = ours(tiny)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-2)
    after.square().mean().backward()
    assert all(".novel." in name for name in gradients(tiny.model))
    nothing = torch.tensor([1, NULL])
    tiny.model.set_adapter("default")
    alone = ours(tiny, class_labels=nothing)
    tiny.model.base_model.set_adapter(["default", "novel"])
    assert torch.equal(ours(tiny, class_labels=nothing), alone)


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "sd3", "flux"])
def test_closed_tailors_are_exactly_nothing(name):
    """Layer by layer, on the same tensors, because BLAS rounds differently from one memory address to the next."""
    tiny, same = adapted(name, num_learngene=0), []
    for layer in layers(tiny.model).values():
        layer.register_forward_hook(
            lambda layer, args, output: same.append(torch.equal(layer.base_layer(*args), output))
        )
    ours(tiny, class_gate(tiny.model, [NULL, NULL]))
    assert len(same) == len(layers(tiny.model)) and all(same)
    same.clear()
    ours(tiny, class_gate(tiny.model, [NULL, 1]))
    assert not any(same)


# What is wrong


def test_no_gate():
    for name in ("mlp", "sd3"):
        tiny = adapted(name)
        with pytest.raises(RuntimeError, match="nothing says which class.*class_labels.*inside `with class_gate"):
            ours(tiny)
    with pytest.raises(ValueError, match="MLP has no KIND adapter"), class_gate(MODELS["mlp"]().model, [1]):
        pass


@pytest.mark.parametrize("bad", [0, 4, -1, 11, 10**9])
def test_unknown_labels(bad):
    """Out of range, or of no group. The next call is none the worse for it."""
    tiny = adapted()
    output = ours(tiny)
    with pytest.raises(ValueError, match=rf"does not know the classes \[{bad}\], only 6 of"):
        ours(tiny, class_gate(tiny.model, [bad, 1]))
    assert is_clean(tiny.model)
    message = r"does not know the classes \[4\]" if bad == 4 else rf"has no such class_labels: \[{bad}\], only 0 to 10"
    message = r"does not know the classes \[0\]" if bad == 0 else message
    for labels in ([1, bad], [bad, 7]):
        with pytest.raises(ValueError, match=message):
            ours(tiny, class_labels=torch.tensor(labels))
        with pytest.raises(ValueError, match=message) if bad not in (0, 4) else nullcontext():
            ours(tiny, class_gate(tiny.model, [1, 7]), class_labels=torch.tensor(labels))  # the model's own table
    assert is_clean(tiny.model)
    assert torch.equal(ours(tiny), output)


GATED = ["mlp", "conv1d", "conv2d", "dit", "pixart", "sd3", "flux", "sana", "lumina2", "vit", "gpt2", "llama", "t5"]


@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("classes", [[1], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_another_batch(name, classes, mode):
    """A gate of another size than the batch, built of ids, of weights, and with the rows of guidance before it."""
    tiny = adapted(name, mode=mode)
    message = r"has \d rows, but this layer's batch has 2 samples"
    weights = torch.ones(len(classes), 10)
    for given, guidance in ((classes, False), (weights, False), ([1, 2], True), (classes, True)):
        with pytest.raises(ValueError, match=message) if len(given) * (1 + guidance) != 2 else nullcontext():
            ours(tiny, class_gate(tiny.model, given, guidance=guidance))
        assert is_clean(tiny.model)


@pytest.mark.parametrize("wrap", [False, True], ids=["injected", "wrapped"])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_labels_of_another_batch(dtype, wrap):
    """Before the model adds their embeddings to those of the timesteps, which ends in torch's words."""
    tiny = adapted()
    tiny.model = tiny.model if wrap else tiny.model.get_base_model()
    for labels, message in (
        ([1, 3, 7], "class_labels has 3 labels, but the batch has 2 samples"),
        ([1], "has 1 rows, but this layer's batch has 2 samples"),
        ([], "class_labels has 0 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(tiny, class_labels=torch.tensor(labels, dtype=dtype))
        hidden, timestep = tiny.inputs["hidden_states"], tiny.inputs["timestep"]
        with pytest.raises(ValueError, match=message):
            tiny.model(hidden, timestep, torch.tensor(labels, dtype=dtype))
    assert is_clean(tiny.model)


@pytest.mark.parametrize("labels", [torch.ones(2), torch.tensor([[1, 2]] * 2), torch.tensor([True, False])], ids=str)
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match=r"class_labels of shape .* is none: give one id, ids \(B,\)"):
        ours(adapted(), class_labels=labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(dtype):
    """torch reads bytes as masks, and no other short numbers at all."""
    tiny = adapted("mlp")
    found = ours(tiny, class_gate(tiny.model, torch.tensor([1, 2], dtype=dtype)))
    torch.testing.assert_close(found, ours(tiny, class_gate(tiny.model, [1, 2])), **CLOSE)


def test_guided_pipelines():
    """DiTPipeline asks for label 1000 without a class, whatever model it is given."""
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    pipe = DiTPipeline(adapted().model.get_base_model(), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"has no such class_labels: \[1000\], only 0 to 10"):
        pipe([1], num_inference_steps=1, guidance_scale=4.0)


WRONG = [
    ([[1, 2]], {}, r"shape \[1, 2\] and torch.int64"),
    ([1.0, 2.0], {}, r"shape \[2\] and torch.float32"),
    ([True, False], {}, "torch.bool"),
    (True, {}, "torch.bool"),
    ([], {}, r"shape \[0\]"),
    (None, {}, "gate of None is none"),
    ("cat", {}, "gate of 'cat' is none"),
    ([[1], [1, 2]], {}, "is none"),
    ([10**30, 1], {}, "is none"),
    (-1, {}, r"does not know the classes \[-1\]"),
    (10**9, {}, r"does not know the classes \[1000000000\]"),
    ([1], {"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    (1, {"guidance": True}, "do not say how many rows"),
    (torch.ones(2, 9), {}, "weights for 9 classes, the adapter 10"),
]


@pytest.mark.parametrize(("classes", "fields", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_gates(classes, fields, message):
    tiny = adapted("mlp")
    with pytest.raises(ValueError, match=message):
        ours(tiny, class_gate(tiny.model, classes, **fields))
    assert is_clean(tiny.model)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_no_stale_gate(error):
    """After an exception in the middle of a forward, with checkpointing on."""
    tiny = adapted()
    tiny.model.base_model.model.enable_gradient_checkpointing()

    def fail(*_):
        raise error

    handle = tiny.model.base_model.model.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        ours(tiny)
    handle.remove()
    assert is_clean(tiny.model) == (error is not KeyboardInterrupt)  # after which torch runs no hooks: the next call
    tiny.inputs["class_labels"] = torch.tensor([2, 9])
    check("dit", tiny, [2, 9], ours(tiny))
    assert is_clean(tiny.model)


# Merging: one class


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_merging_one_class(mode):
    tiny = adapted(mode=mode)
    mixed = ours(tiny)
    with pytest.raises(RuntimeError, match="depends on the class.*inside `with class_gate"):
        tiny.model.merge_adapter()
    with pytest.raises(RuntimeError, match="depends on the class"), class_gate(tiny.model, [3, 3]):
        tiny.model.merge_adapter()
    ids = torch.tensor([3, 3])
    three = ours(tiny, class_labels=ids)
    with class_gate(tiny.model, 3):
        tiny.model.merge_adapter()
    torch.testing.assert_close(ours(tiny, class_labels=ids), three, **CLOSE)
    with pytest.raises(ValueError, match="one class is merged, but the batch has others"):
        ours(tiny)
    tiny.model.unmerge_adapter()
    torch.testing.assert_close(ours(tiny), mixed, **CLOSE)
    plain, state = dense("dit", tiny.model, [{"default": 3}])[0]
    with class_gate(tiny.model, 3):
        merged = tiny.model.merge_and_unload()
    assert type(merged) is type(plain) and not layers(merged)
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, state.get(key, plain.state_dict()[key]), **CLOSE)


def test_no_conversion_of_several_classes():
    tiny = adapted("mlp")
    assert not any(layer.supports_lora_conversion() for layer in layers(tiny.model).values())
    with class_gate(tiny.model, 3):
        assert all(layer.supports_lora_conversion() for layer in layers(tiny.model).values())


# Copies, files, unloading


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies(copy):
    """A copy has a state of its own, which its own hooks feed."""
    tiny = adapted(mode="generate")
    output, other = ours(tiny), copy(tiny.model)
    state = {layer.gate for layer in layers(other).values()}
    assert len(state) == 1 and state != {layer.gate for layer in layers(tiny.model).values()}
    torch.testing.assert_close(output_of(other(**tiny.inputs)), output, **CLOSE)
    with class_gate(other, [2, 2]):
        torch.testing.assert_close(ours(tiny), output, **CLOSE)
    other.add_adapter("second", KINDConfig(num_classes=0))
    other.delete_adapter("default"), other.delete_adapter("second")
    assert not other.base_model.model._forward_hooks and not hasattr(other.base_model.model, STATE)
    torch.testing.assert_close(ours(tiny), output, **CLOSE)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files(low_cpu_mem_usage, tmp_path):
    """The gate matrix is not in a file, and comes back with the config; also onto the meta device and off it."""
    tiny = adapted(mode="generate")
    tiny.model.save_pretrained(tmp_path)
    with torch.device("meta" if low_cpu_mem_usage else "cpu"):
        model = MODELS["dit"]().model
    model = PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_state_dict(tiny.model.state_dict(), assign=True)
    for name, buffer in tiny.model.named_buffers():
        if low_cpu_mem_usage and model.get_buffer(name).is_meta:
            assert "learngene_" not in name
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = buffer
    assert torch.equal(output_of(model(**tiny.inputs)), ours(tiny))
    assert not [key for key in tiny.model.state_dict() if "classes" in key]


def test_one_table_a_model():
    """However many layers, classes and dtypes: as bits, once, wherever the model goes."""
    model = adapted(assignment="every class", mode="generate").model.to(torch.bfloat16).to("meta")
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith(("matrix", "known"))}
    assert {buffer.dtype for buffer in tables.values()} == {torch.bool} and len(tables) == 2
    assert all(buffer.is_meta for buffer in tables.values())


def test_hooks_go_with_the_last_adapter():
    """Through the tuner; and through diffusers, which asks none: then with the next call."""
    plain = MODELS["dit"]()()
    for how in ("unload", "delete"):
        tiny = adapted()
        root = tiny.model.base_model.model
        tiny.model.unload() if how == "unload" else tiny.model.delete_adapter("default")
        assert not root._forward_pre_hooks and not root._forward_hooks and not hasattr(root, STATE)
        torch.testing.assert_close(output_of(root(**tiny.inputs)), plain, **CLOSE)
    model = add_adapter(MODELS["dit"]().model, KINDConfig(init_weights=False))
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    recurse_remove_peft_layers(model)
    del model.peft_config
    torch.testing.assert_close(output_of(model(**MODELS["dit"]().inputs)), plain, **CLOSE)
    assert not model._forward_pre_hooks and not model._forward_hooks and not hasattr(model, STATE)


def test_without_a_peft_model(tmp_path):
    tiny, other = MODELS["dit"](), MODELS["dit"]()
    add_adapter(tiny.model, KINDConfig(init_weights=False, class_groups=[[1, 7], [7]]))
    output = ours(tiny)
    save_adapter(tiny.model, tmp_path)
    load_adapter(other.model, tmp_path)
    assert torch.equal(ours(other), output)


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_fused_layers_share_a_product(mode):
    """q, k and v multiply x with their V once, and nothing is kept when they have; with another x, each by itself."""
    tiny = adapted(mode=mode)
    gate = Gate(torch.tensor([1, 2]), explicit=True)
    attention = tiny.model.base_model.model.transformer_blocks[0].attn1
    qkv = [attention.to_q, attention.to_k, attention.to_v]
    x, other = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    qkv[0].gate.push(gate, tiny.model)

    def matmuls(inputs):
        with FlopCounterMode(display=False) as counter:
            outputs = [layer(value) for layer, value in zip(qkv, inputs, strict=True)]
        assert gate._kept is None or len({id(value) for value in inputs}) > 1
        return outputs, counter.get_total_flops()

    tokens, rank = 10, qkv[0].bank("default").rank
    shared, flops = matmuls([x, x, x])
    apart, more = matmuls([x, x.clone(), x.clone()])
    assert more - flops == 2 * 2 * tokens * rank * 16
    torch.testing.assert_close(shared, apart)
    changed, _ = matmuls([x, other, x])
    x_before = x.clone()
    first = qkv[0](x)
    x.mul_(2)  # the same tensor, but not the same numbers
    torch.testing.assert_close(qkv[1](x), qkv[1](2 * x_before))
    torch.testing.assert_close([first, changed[2]], [shared[0], shared[2]])
    qkv[0].gate.pop()
