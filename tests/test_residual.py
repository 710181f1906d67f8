# SPDX-License-Identifier: Apache-2.0
"""The tensors that end residual branches: scaling them scales the branches, and nothing else."""

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from ancestries import ARCHITECTURES, OUTPUTS, ancestry
from diffusers_learngene import WAVEConfig
from diffusers_learngene.blocks import find_stacks
from diffusers_learngene.closed_form import closed_form
from diffusers_learngene.learngene import Learngene
from diffusers_learngene.models import tensors_of
from diffusers_learngene.residual import residual_ends
from diffusers_learngene.tracing import uncalled_modules
from models import run
from residual_models import RESIDUAL_MODELS


PRE_NORM = sorted(RESIDUAL_MODELS.keys() - {"conv2d"})
ADDED = {"gemma2": 1.0, "gemma3": 1.0}  # to the weights of norms that multiply by 1 + w
ENDS = {
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "phi3": ("mlp.down_proj", "self_attn.o_proj"),
    "mixtral": ("mlp.experts", "self_attn.o_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "t5_decoder": (
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wo",
        "layer.1.EncDecAttention.o",
        "layer.2.DenseReluDense.wo",
    ),
    "swinv2": ("layernorm_after", "layernorm_before"),
    "hunyuandit": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
    "hidream": (
        "block.attn1.to_out",
        "block.attn1.to_out_t",
        *(f"block.ff_i.experts.{i}.w2" for i in range(3)),
        "block.ff_i.shared_experts.w2",
        "block.ff_t.w2",
    ),
    "kandinsky": ("cross_attention.out_layer", "feed_forward.out_layer", "self_attention.out_layer"),
}


def blocks_of(model):
    return {
        f"{stack}.{layer}": block
        for stack, blocks in find_stacks(model).items()
        for layer, block in blocks.named_children()
    }


def roles_of(model, ends):
    roles = {
        name.removeprefix(f"{path}.") for path in blocks_of(model) for name in ends if name.startswith(f"{path}.")
    }
    return {role.rpartition(".")[0] for role in roles}


def tensors_in(value):
    """The floating-point tensors in what a block takes or returns."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def calls_of(tiny):
    """By path, what every block is called with in a call of its model."""
    calls, handles = {}, []
    for path, block in blocks_of(tiny.model).items():
        hook = lambda _, args, kwargs, path=path: calls.setdefault(path, (args, kwargs))  # noqa: E731
        handles.append(block.register_forward_pre_hook(lambda *a, hook=hook: hook(*a) and None, with_kwargs=True))
    run(tiny.model, tiny.inputs)
    for handle in handles:
        handle.remove()
    return calls


def scale_(tensors, ends, gain):
    for name, added in ends.items():
        tensors[name].copy_((tensors[name] + added) * gain - added)


def drawn(name):
    """A model in float64 of which no tensor is zero or one, so that nothing is the identity by chance."""
    tiny = RESIDUAL_MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    tiny.model.double()
    for tensor in tiny.model.parameters():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    tiny.inputs = {key: doubled(value) for key, value in tiny.inputs.items()}
    return tiny


def doubled(value):
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def silent_ends(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return residual_ends(model)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ENDS])
def test_where_branches_end(name):
    model = ancestry(name).model if name in ARCHITECTURES else RESIDUAL_MODELS[name]().model
    ends = silent_ends(model)
    assert roles_of(model, ends) == set(OUTPUTS[name] if name in ARCHITECTURES else ENDS[name])
    assert set(ends.values()) == {ADDED.get(name, 0.0)} and ends.keys() <= tensors_of(model).keys()


@torch.no_grad()
@pytest.mark.parametrize("name", PRE_NORM)
def test_a_block_without_branches_is_the_identity(name):
    """Scaled by 0, every stream leaves as it came (HunyuanDiT's later blocks first merge two); one branch alone,
    scaled by g, is g times what it was."""
    tiny = drawn(name)
    ends, tensors = silent_ends(tiny.model), dict(tiny.model.named_parameters())
    calls = calls_of(tiny)
    for path, (args, kwargs) in calls.items():
        block = tiny.model.get_submodule(path)
        if getattr(block, "skip_linear", None) is not None:
            continue
        own = {key: added for key, added in ends.items() if key.startswith(f"{path}.")}
        kept = {key: tensors[key].clone() for key in own}
        scale_(tensors, own, 0)
        given = tensors_in((args, kwargs))
        base = tensors_in(block(*args, **kwargs))
        streams = [x for x in base if any(x.shape == y.shape and torch.allclose(x, y) for y in given)]
        assert streams and own
        for x in base:  # what else is returned, such as attention weights, is as wide as no stream
            assert any(x is stream for stream in streams) or x.shape not in {y.shape for y in given}
        for one in {key.rpartition(".")[0] for key in own}:
            scaled = []
            for gain in (1, 3):
                for key in own:
                    if key.rpartition(".")[0] == one:
                        tensors[key].copy_(kept[key])
                        scale_(tensors, {key: own[key]}, gain)
                scaled.append(tensors_in(block(*args, **kwargs)))
            for key in own:
                tensors[key].copy_(kept[key])
            scale_(tensors, own, 0)
            differences = [
                (once - none, thrice - none)
                for once, thrice, none in zip(*scaled, base, strict=True)
                if any(none is s for s in streams)
            ]
            for once, thrice in differences:
                torch.testing.assert_close(thrice, 3 * once)
            routed = ".experts." in one  # no token may have been routed to this one
            assert routed or any(once.abs().max() > 1e-6 for once, _ in differences), one
        for key in own:
            tensors[key].copy_(kept[key])
