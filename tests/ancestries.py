# SPDX-License-Identifier: Apache-2.0
"""The rows of the matrix: every law of learngenes is tried on all of these architectures.

`ancestry(name)` is a new tiny model that can be condensed, `learngene(name, method)` a lossless learngene of it (do
not change it: it is made once), `DEPTH` and `WIDTH` say how its config names its sizes. `each_method` tries a test on
every method.
"""

import functools
import inspect
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DeiTModel

from diffusers_learngene import FINEConfig, Learngene, WAVEConfig
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.blocks import find_stacks, group_matrices
from diffusers_learngene.functional import fine, wave
from diffusers_learngene.tuners.base_config import LearngeneConfig
from models import MODELS, Tiny


ARCHITECTURES = [
    *("dit", "pixart", "sd3", "flux", "sana", "lumina2"),
    *("vit", "deit", "gpt2", "llama", "t5", "bert"),
]

each_method = pytest.mark.parametrize("method", ["wave", "fine"])

# The keys that a config has for its depth, and for its width; a width multiplies all of its keys.
DEPTH: dict[str, tuple[str, ...]] = dict.fromkeys(ARCHITECTURES, ("num_layers",)) | {
    "flux": ("num_layers", "num_single_layers"),
    "lumina2": ("num_layers", "num_refiner_layers"),
    "gpt2": ("n_layer",),
    **dict.fromkeys(("vit", "deit", "llama", "bert"), ("num_hidden_layers",)),
}
_ENCODER = ("num_attention_heads", "hidden_size", "intermediate_size")
WIDTH: dict[str, tuple[str, ...]] = {
    "dit": ("num_attention_heads",),
    "pixart": ("num_attention_heads", "cross_attention_dim"),
    "sd3": ("num_attention_heads", "caption_projection_dim"),
    "flux": ("num_attention_heads",),
    "sana": ("num_attention_heads", "num_cross_attention_heads", "cross_attention_dim"),
    "lumina2": ("num_attention_heads", "num_kv_heads", "hidden_size"),
    "vit": _ENCODER,
    "deit": _ENCODER,
    "gpt2": ("n_head", "n_embd"),
    "llama": (*_ENCODER, "num_key_value_heads"),
    "t5": ("num_heads", "d_model", "d_ff"),
    "bert": _ENCODER,
}
# The modules that end the residual branches of a block.
_MMDIT = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
OUTPUTS: dict[str, tuple[str, ...]] = {
    "dit": ("attn1.to_out.0", "ff.net.2"),
    "pixart": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
    "sd3": _MMDIT,
    "flux": (*_MMDIT, "proj_out"),
    "sana": ("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point"),
    "lumina2": ("norm2", "ffn_norm2"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "deit": ("attention.o_proj", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "t5": ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
    "bert": ("attention.output.dense", "output.dense"),
}


def ancestry(name: str, seed: int = 0) -> Tiny:
    """A tiny model that can be condensed, with its inputs."""
    if name == "bert":
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        ids = torch.arange(12).reshape(2, 6)
        return Tiny(_seeded(lambda: BertForSequenceClassification(config), seed), {"input_ids": ids})
    tiny = MODELS[name](seed)
    if name == "dit":  # trained as DiTs are: with one embedder for all blocks, as in the copies of a converted file
        first, *others = tiny.model.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    if name == "deit":  # whole: `add_pooling_layer=False` is in no config
        config = tiny.model.config
        tiny.model = _seeded(lambda: DeiTModel(config), seed)
    return tiny


def _seeded(make: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def lossless(model: nn.Module, method: str = "wave") -> LearngeneConfig:
    """A config whose banks are as large as the groups of a model can use."""
    groups = [group for group in group_matrices(Anatomy.of(model).matrices) if group.num_layers > 1]
    if method == "fine":
        ranks = {group.key: group.num_layers * fine.default_rank(group.shapes) for group in groups}
        return FINEConfig(mode="generate", group_ranks=ranks)
    pattern = {}
    for group in groups:
        size = wave.default_template_size(group.shapes)
        tiles = group.num_layers * sum(a * b for a, b in (wave.grid(shape, size) for shape in group.shapes))
        pattern[group.key] = [min(tiles, size[0] * size[1]), *size]
    return WAVEConfig(mode="generate", template_pattern=pattern)


@functools.cache
def learngene(name: str, method: str = "wave") -> Learngene:
    """A learngene that holds all that its ancestry holds."""
    model = ancestry(name).model
    return Learngene.condense(model, lossless(model, method))


def depth(name: str, layers: int) -> dict[str, int]:
    """Config overrides of a depth, in every stack."""
    return dict.fromkeys(DEPTH[name], layers)


def width(name: str, factor: float) -> dict[str, int]:
    """Config overrides of a width."""
    config = learngene(name).config.base_config
    return {key: int(config[key] * factor) for key in WIDTH[name]}


def stock(model: nn.Module, **overrides: Any) -> Any:
    """A stock model of the same class and another size, with weights of its own."""
    cls: Any = type(model)
    config: Any = model.config
    if isinstance(model, ModelMixin):
        known = inspect.signature(cls.__init__).parameters
        return cls(**{key: value for key, value in config.items() if key in known} | overrides).eval()
    return cls(cls.config_class.from_dict(config.to_dict() | overrides)).eval()


def select_layers(name: str, overrides: dict[str, int]) -> Any:
    """What `descend` to another depth has to compute, made by hand from the dense ancestry.

    Every layer is the one at the same relative depth, each tensor from the nearest layer that has one of its shape;
    the outputs of residual branches are multiplied by L / L', BERT's (post-norm) by no more than 1.
    """
    from diffusers_learngene.functional.resize import relative_layers

    model = ancestry(name).model
    other, old = stock(model, **overrides), model.state_dict()
    new = {}
    for key, tensor in other.state_dict().items():
        stack = next((stack for stack in find_stacks(model) if key.startswith(f"{stack}.")), None)
        if stack is None:
            new[key] = old[key]
            continue
        layer, _, path = key.removeprefix(f"{stack}.").partition(".")
        source, target = len(model.get_submodule(stack)), len(other.get_submodule(stack))
        wanted = relative_layers(source, target)[int(layer)]
        options = [old.get(f"{stack}.{i}.{path}") for i in range(source)]
        near = [i for i, option in enumerate(options) if option is not None and option.shape == tensor.shape]
        new[key] = options[min(near, key=lambda i: abs(i - wanted))]
        if path.rpartition(".")[0] in OUTPUTS[name]:
            new[key] = new[key] * (min(1, source / target) if name == "bert" else source / target)
    other.load_state_dict(new)
    return other
