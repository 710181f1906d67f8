# SPDX-License-Identifier: Apache-2.0
"""The tensors that end residual branches: scaling them scales the branches, and nothing else."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from ancestries import ARCHITECTURES, OUTPUTS, ancestry
from diffusers_learngene import WAVEConfig
from diffusers_learngene.anatomy import Anatomy, End
from diffusers_learngene.anatomy.blocks import find_stacks
from diffusers_learngene.anatomy.tensors import tensors_of
from diffusers_learngene.initializers.selection import selection
from diffusers_learngene.learngene.closed_form import target_groups
from diffusers_learngene.learngene.layout import layout_of
from models import run
from residual_models import RESIDUAL_MODELS


PRE_NORM = [name for name in RESIDUAL_MODELS if name not in ("mlp", "conv1d", "conv2d")]
ADDED = {"gemma2": 1.0, "gemma3": 1.0}  # to the weights of norms that multiply by 1 + w
POST_NORM = ("bert",)
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
    for name, end in ends.items():
        tensors[name].copy_(end.scaled(tensors[name], gain))


def drawn(name):
    """A model of which no tensor is zero or one, so that nothing is the identity by chance."""
    tiny = RESIDUAL_MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    if getattr(tiny.model.config, "use_cache", False):
        tiny.model.config.use_cache = False
    for tensor in tiny.model.parameters():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return tiny


def silent_ends(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Anatomy.of(model).ends


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ENDS])
def test_where_branches_end(name):
    model = ancestry(name).model if name in ARCHITECTURES else RESIDUAL_MODELS[name]().model
    ends = silent_ends(model)
    assert roles_of(model, ends) == set(OUTPUTS[name] if name in ARCHITECTURES else ENDS[name])
    assert set(ends.values()) == {End(ADDED.get(name, 0.0), name in POST_NORM)}
    assert ends.keys() <= tensors_of(model).keys()


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
        own = {key: added for key, added in ends.items() if key.startswith(f"{path}.")}
        if not own or getattr(block, "skip_linear", None) is not None:
            continue
        kept = {key: tensors[key].clone() for key in own}
        scale_(tensors, own, 0)
        given = tensors_in((args, kwargs))
        base = tensors_in(block(*args, **kwargs))
        streams = [x for x in base if any(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for y in given)]
        assert streams
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
                torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-4)
            routed = ".experts." in one  # no token may have been routed to this one
            assert routed or any(once.abs().max() > 1e-3 for once, _ in differences), one
        for key in own:
            tensors[key].copy_(kept[key])


class Norm(nn.Module):
    """The identity on what is normalised already, after the sum: x -> norm(x + f(x))."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).tanh()))


class Read(nn.Module):
    """x + f(x) whose last matrix is read, not called."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + nn.functional.linear(self.up(x).tanh(), self.down.weight, self.down.bias)


class Lost(nn.Module):
    """A branch that ends in a norm without weights, and one that cannot be followed."""

    def __init__(self, followed):
        super().__init__()
        self.down, self.norm, self.followed = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), followed

    def forward(self, x):
        return x + self.norm(self.down(x)) if self.followed else x + self.down(torch.from_numpy(x))


def stacked(*blocks):
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def test_a_norm_after_the_sum_is_left_alone():
    assert set(silent_ends(stacked(Norm(), Norm()))) == {
        f"blocks.{layer}.down.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }


@pytest.mark.parametrize(("followed", "reason"), [(True, "1 of its residual branches"), (False, "cannot be followed")])
def test_what_cannot_be_scaled_is_said_and_not_guessed(followed, reason):
    with pytest.warns(UserWarning, match=f"Lost: {reason}|Lost: its forward {reason}"):
        assert Anatomy.of(stacked(Lost(followed), Lost(followed))).ends == {}


def test_matrices_that_are_read_without_being_called():
    model = stacked(Read(), Read())
    assert Anatomy.of(model).uncalled == {"blocks.0.down", "blocks.1.down"}
    assert len(silent_ends(model)) == 4
    groups = target_groups(Anatomy.of(model), WAVEConfig())
    assert {matrix.role for group in groups for matrix in group.matrices} == {"up"}
    assert Anatomy.of(ancestry("dit").model).uncalled == Anatomy.of(ancestry("llama").model).uncalled == set()


def test_following_a_block_leaves_no_trace():
    """Neither in its tensors, nor in its modules, nor in the random state."""
    model, other = ancestry("flux").model, ancestry("flux").model
    state = torch.get_rng_state()
    ends = silent_ends(model)
    assert torch.equal(state, torch.get_rng_state()) and ends == silent_ends(model.to("meta"))
    assert [str(m) for m in model.modules()] == [str(m) for m in other.modules()]
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["lumina2", "olmo2"])
def test_a_deeper_descendant_keeps_the_size_of_the_stream(name):
    """Twice the depth from half the gain: what the blocks add to the stream is as large as in the ancestry."""
    tiny = drawn(name)
    key = "num_layers" if name == "lumina2" else "num_hidden_layers"
    stack = next(stack for stack in find_stacks(tiny.model) if stack.endswith("layers"))
    source = len(tiny.model.get_submodule(stack))
    deep = selection(tiny.model, {key: 2 * source}, gain=0.5)
    without = selection(tiny.model, {key: 2 * source}, gain=1.0)
    added = [change(model.eval(), tiny.inputs, stack) for model in (tiny.model, deep, without)]
    assert 0.6 < added[1] / added[0] < 1.4 < added[2] / added[0]


def change(model, inputs, stack):
    """The size of what all blocks of a stack add to their stream."""
    streams = []
    blocks = model.get_submodule(stack)
    first = blocks[0].register_forward_pre_hook(
        lambda _, *given: streams.extend(tensors_in(given)[:1]), with_kwargs=True
    )
    last = blocks[-1].register_forward_hook(lambda _, args, output: streams.append(tensors_in(output)[0]))
    run(model, inputs)
    first.remove()
    last.remove()
    return float((streams[1] - streams[0]).norm())


def test_the_gain_reaches_what_a_norm_multiplies_by():
    """Gemma's norms multiply by 1 + w, and that is scaled."""
    entries = layout_of(Anatomy.of(RESIDUAL_MODELS["gemma2"]().model)).entries
    outputs = [entry for entry in entries.values() if entry.ends]
    weight = torch.randn(3, 32)
    assert len(outputs) == 2
    for entry in outputs:
        torch.testing.assert_close(1 + entry.scaled(weight, lambda _: 0.5), 0.5 * (1 + weight))
        assert torch.equal(entry.scaled(weight, lambda _: 1.0), weight)
