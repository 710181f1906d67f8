# SPDX-License-Identifier: Apache-2.0
"""What torch and accelerate do to modules: half precision, compiling, checkpointing, copies, quantising, offload."""

import itertools
import pickle
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import SD3Transformer2DModel, TorchAoConfig
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torchao.quantization import Int8WeightOnlyConfig

from diffusers_learngene import WAVEConfig
from diffusers_learngene.tuners.base_layer import LearngeneLayer
from diffusers_learngene.tuners.scalers import plain_name
from models import MODELS, run
from tuners.conftest import METHODS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def adapted(name, config):
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, config)
    return tiny


def layers(model):
    return [module for module in model.modules() if isinstance(module, LearngeneLayer)]


def owned_by(users, part, adapter):
    return {id(getattr(user, part)[adapter]) for user in users if adapter in getattr(user, part)}


def cast(tiny, dtype):
    tiny.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs.items()}


HALF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d"])
def test_half_precision_model(name, dtype, method, factored):
    """The adapter stays in fp32 and the result in the model's dtype, near that of the fp32 model."""
    tiny, half = adapted(name, method()), MODELS[name]()
    half.model = get_peft_model(half.model.to(dtype), method())
    half.model.load_state_dict({k: v for k, v in tiny.model.state_dict().items() if "learngene_" in k}, strict=False)
    assert {p.dtype for n, p in half.model.named_parameters() if "learngene_" in n} == {torch.float32}
    cast(half, dtype)
    expected, found = tiny(), half()
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < HALF[dtype] * (1 + expected.abs().max())
    found.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in half.model.parameters() if p.requires_grad
    )
    half.model.merge_adapter()
    assert {p.dtype for n, p in half.model.named_parameters() if "base_layer" in n} == {dtype}
    assert (half().float() - expected).abs().max() < HALF[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d"])
def test_autocast(name, base, method, factored):
    """The result has the dtype that it would have without the adapter."""
    tiny, plain = adapted(name, method()), MODELS[name]()
    expected = tiny()
    tiny.model.to(base), plain.model.to(base)
    cast(tiny, base), cast(plain, base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiny()
        assert found.dtype == plain().dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 2 * HALF[torch.bfloat16] * (1 + expected.abs().max())


def test_adapter_dtype_is_peft_s_choice():
    model = get_peft_model(MODELS["mlp"]().model.bfloat16(), WAVEConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "learngene_" in n} == {torch.bfloat16}


def test_loading_into_half_precision_keeps_every_bit(method, tmp_path):
    tiny = adapted("mlp", method())
    tiny.model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = MODELS["mlp"]().model.bfloat16()
        model = PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[n], p) for n, p in tiny.model.named_parameters() if "learngene_" in n)


COMPILED = [
    *itertools.product([("conv2d", "aot_eager"), ("dit", "eager")], ["wave-odd", "wave-generate-odd"]),
    (("conv2d", "aot_eager"), "fine-odd"),
    (("dit", "eager"), "fine-generate-wide"),
]


@pytest.mark.parametrize(("host", "kind"), COMPILED, ids=str)
def test_compile(host, kind, factored):
    """In one graph, forward and backward, with a second adapter beside."""
    name, backend = host
    tiny = adapted(name, METHODS[kind]())
    tiny.model.add_adapter("second", METHODS[kind].config_cls(init_weights=False))
    tiny.model.base_model.set_adapter(["default", "second"])
    output = tiny()
    output.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, fullgraph=True, backend=backend)
    found = run(compiled, tiny.inputs)
    torch.testing.assert_close(found, output, **CLOSE)
    found.square().mean().backward()
    for n, p in tiny.model.named_parameters():
        if n in grads:
            torch.testing.assert_close(p.grad, grads[n], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, method):
    tiny = adapted("dit", method())
    tiny.model.train()
    for block in tiny.model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0
    tiny.inputs["hidden_states"].requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            tiny.model.base_model.model.enable_gradient_checkpointing(
                lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant)
            )
        tiny.model.zero_grad()
        tiny().square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies(copy, method):
    """A copy shares among its own layers, and nothing with the original."""
    tiny = adapted("dit", method())
    tiny.model.add_adapter("second", method.config_cls())
    output, other = tiny(), copy(tiny.model)
    assert not {p.data_ptr() for p in other.parameters() if p.numel()} & {
        p.data_ptr() for p in tiny.model.parameters()
    }
    for adapter in ("default", "second"):
        users = [layer for layer in layers(other) if adapter in layer.scaling]
        assert {id(user.bank(adapter)) for user in users} == owned_by(users, "banks", adapter)
        assert {id(user.scaler(adapter)) for user in users} == owned_by(users, "scalers", adapter)
    torch.testing.assert_close(run(other, tiny.inputs), output, **CLOSE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    torch.testing.assert_close(tiny(), output, **CLOSE)


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    MODELS["sd3"]().model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_model(sd3_folder, adder):
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["proj_out"])
    tiny = MODELS["sd3"]()
    tiny.model = SD3Transformer2DModel.from_pretrained(
        sd3_folder, quantization_config=config, torch_dtype=torch.float32
    )
    expected = tiny()
    tiny.model = get_peft_model(tiny.model, adder(init_weights=True))
    assert all(layer.quantization_backend.backend_name == "torchao" for layer in layers(tiny.model))
    torch.testing.assert_close(tiny(), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for layer in layers(tiny.model):
            layer.scaler("default").weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    output = tiny()
    assert not torch.allclose(output, expected, atol=1e-2)
    output.square().mean().backward()
    assert all(p.grad is not None for layer in layers(tiny.model) for p in layer.banks.parameters())
    tiny.model = tiny.model.merge_and_unload()
    torch.testing.assert_close(tiny(), output, rtol=0.1, atol=0.1)  # quantised once more


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_generated_weights_are_not_quantised(sd3_folder, generator):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = SD3Transformer2DModel.from_pretrained(sd3_folder, quantization_config=config, torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="because it is quantised"):
        get_peft_model(model, generator())


@pytest.mark.parametrize("name", ["dit", "mlp", "conv1d", "conv2d"])
def test_cpu_offload(name, method, factored):
    """Every tensor is away until a hook of its module brings it."""
    tiny = adapted(name, method())
    output = tiny()
    cpu_offload(tiny.model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in tiny.model.parameters())
    torch.testing.assert_close(tiny(), output, **CLOSE)


def layerwise_cast(config, storage, compute, *, added_first):
    """A tiny SD3 with an adapter, stored in one dtype and computed in another."""
    tiny = MODELS["sd3"]()
    tiny.model.to(compute)
    cast(tiny, compute)
    if added_first:
        tiny.model.add_adapter(config)
    tiny.model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    if not added_first:
        tiny.model.add_adapter(config)
    return tiny


LAYERWISE = [
    (torch.bfloat16, torch.float32, True),
    (torch.float8_e4m3fn, torch.float32, False),
    (torch.float8_e4m3fn, torch.bfloat16, True),
]


@pytest.mark.parametrize(("storage", "compute", "added_first"), LAYERWISE, ids=str)
def test_layerwise_casting(storage, compute, added_first, method, factored):
    """diffusers stores the base weights in few bits: the outputs are those of a model whose weights have lost them."""
    tiny = layerwise_cast(method(), storage, compute, added_first=added_first)
    assert {p.dtype for name, p in tiny.model.named_parameters() if "ff.net.2.base_layer" in name} == {storage}
    rounded = MODELS["sd3"]()
    rounded.model.add_adapter(method())
    rounded.model.load_state_dict({name: tensor.float() for name, tensor in tiny.model.state_dict().items()})
    output, expected = tiny(), rounded()
    close = CLOSE if compute == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert output.dtype == compute
    torch.testing.assert_close(output.float(), expected, **close)
    assert {p.dtype for name, p in tiny.model.named_parameters() if "ff.net.2.base_layer" in name} == {storage}


@pytest.mark.parametrize("name", ["wave", "fine", "kind"])
def test_layerwise_casting_is_that_of_a_lora(name):
    """Where PEFT's LoRA leaves what the model computes as it is, stored weights, outputs and gradients alike."""
    outputs, states = [], []
    for config in (LoraConfig(target_modules=["to_q", "ff.net.2"]), METHODS[name](init_weights=True)):
        tiny = layerwise_cast(config, torch.float8_e4m3fn, torch.float32, added_first=True)
        output = tiny()
        output.square().mean().backward()
        trained = [p for p in tiny.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32} and any(
            p.grad is not None and p.grad.any() for p in trained
        )
        outputs.append(output)
        states.append({plain_name(key): p for key, p in tiny.model.named_parameters() if not p.requires_grad})
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)
    assert {key: p.dtype for key, p in states[0].items()} == {key: p.dtype for key, p in states[1].items()}


def test_the_input_is_cast_unless_peft_is_told_not_to(method, factored, monkeypatch):
    tiny = adapted("mlp", method())
    expected, dtypes = tiny(), []
    original = LearngeneLayer._product

    def product(layer, adapter, x, bias=None):
        dtypes.append(x.dtype)
        return original(layer, adapter, x, bias)

    monkeypatch.setattr(LearngeneLayer, "_product", product)
    tiny.model.bfloat16()
    for parameter in (p for n, p in tiny.model.named_parameters() if "learngene_" in n):
        parameter.data = parameter.data.float()
    cast(tiny, torch.bfloat16)
    for context, dtype in ((nullcontext(), torch.float32), (disable_input_dtype_casting(tiny.model), torch.bfloat16)):
        dtypes.clear()
        with context:
            torch.testing.assert_close(tiny().float(), expected, rtol=0.1, atol=0.1)
        assert set(dtypes) <= {dtype}
