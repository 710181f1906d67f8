# SPDX-License-Identifier: Apache-2.0
"""What is found in the models: stacks, matrices, groups."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ancestries import ARCHITECTURES, ancestry, depth, stock
from diffusers_learngene import WAVEConfig
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.blocks import (
    find_stacks,
    form_of,
    group_matrices,
    matrix_shape,
    matrix_to_weight,
    weight_to_matrix,
)
from models import MODELS


# Stack -> its depth; group -> the shapes that one layer brings to it, and its layers where they are not all.
_16, _32 = [(16, 16)], [(32, 32)]
_FFN = {"ff.net.0.proj": [(64, 16)], "ff.net.2": [(16, 64)]}
_GQA = [(32, 32), (16, 32), (16, 32)]
_VIT = {
    "attention.q_proj+k_proj+v_proj": _16 * 3,
    "attention.o_proj": _16,
    "mlp.fc1": [(32, 16)],
    "mlp.fc2": [(16, 32)],
}
_LUMINA = {
    "attn.to_q+to_k+to_v": _GQA,
    "attn.to_out.0": _32,
    "feed_forward.linear_1": [(128, 32)],
    "feed_forward.linear_2": [(32, 128)],
    "feed_forward.linear_3": [(128, 32)],
}
EXPECTED = {
    "dit": {
        ("transformer_blocks", 3): {
            "norm1.linear": [(96, 16)],
            "attn1.to_q+to_k+to_v": _16 * 3,
            "attn1.to_out.0": _16,
            **_FFN,
        }
    },
    "pixart": {
        ("transformer_blocks", 2): {
            "attn1.to_q+to_k+to_v": _16 * 3,
            "attn1.to_out.0": _16,
            "attn2.to_q+to_k+to_v": _16 * 3,
            "attn2.to_out.0": _16,
            **_FFN,
        }
    },
    "sd3": {
        ("transformer_blocks", 3): {
            "norm1.linear": [(96, 16)],
            "norm1_context.linear": ([(96, 16)], 2),
            "norm1_context.linear#2": ([(32, 16)], 1),
            "attn.to_q+to_k+to_v": _16 * 3,
            "attn.add_k_proj+add_v_proj+add_q_proj": _16 * 3,
            "attn.to_out.0": _16,
            "attn.to_add_out": (_16, 2),
            "ff_context.net.0.proj": ([(64, 16)], 2),
            "ff_context.net.2": ([(16, 64)], 2),
            **_FFN,
        }
    },
    "flux": {
        ("transformer_blocks", 2): {
            "norm1.linear": [(192, 32)],
            "norm1_context.linear": [(192, 32)],
            "attn.to_q+to_k+to_v": _32 * 3,
            "attn.add_q_proj+add_k_proj+add_v_proj": _32 * 3,
            "attn.to_out.0": _32,
            "attn.to_add_out": _32,
            "ff.net.0.proj": [(128, 32)],
            "ff.net.2": [(32, 128)],
            "ff_context.net.0.proj": [(128, 32)],
            "ff_context.net.2": [(32, 128)],
        },
        ("single_transformer_blocks", 2): {
            "norm.linear": [(96, 32)],
            "attn.to_q+to_k+to_v": _32 * 3,
            "proj_mlp": [(128, 32)],
            "proj_out": [(32, 160)],
        },
    },
    "sana": {
        ("transformer_blocks", 2): {
            "attn1.to_q+to_k+to_v": _16 * 3,
            "attn1.to_out.0": _16,
            "attn2.to_q+to_k+to_v": _16 * 3,
            "attn2.to_out.0": _16,
            "ff.conv_inverted": [(80, 16)],
            "ff.conv_point": [(16, 40)],
        }
    },
    "lumina2": {
        ("noise_refiner", 2): {"norm1.linear": [(128, 32)], **_LUMINA},
        ("context_refiner", 2): _LUMINA,
        ("layers", 2): {"norm1.linear": [(128, 32)], **_LUMINA},
    },
    "vit": {("vit.layers", 3): _VIT},
    "deit": {("layers", 3): _VIT},
    "gpt2": {
        ("transformer.h", 3): {
            "attn.c_attn": [(48, 16)],
            "attn.c_proj": _16,
            "mlp.c_fc": [(64, 16)],
            "mlp.c_proj": [(16, 64)],
        }
    },
    "llama": {
        ("model.layers", 3): {
            "self_attn.q_proj+k_proj+v_proj": _GQA,
            "self_attn.o_proj": _32,
            "mlp.gate_proj": [(48, 32)],
            "mlp.up_proj": [(48, 32)],
            "mlp.down_proj": [(32, 48)],
        }
    },
    "t5": {
        ("encoder.block", 3): {
            "layer.0.SelfAttention.q+k+v": _16 * 3,
            "layer.0.SelfAttention.o": _16,
            "layer.1.DenseReluDense.wi": [(32, 16)],
            "layer.1.DenseReluDense.wo": [(16, 32)],
        }
    },
    "bert": {
        ("bert.encoder.layer", 3): {
            "attention.self.query+key+value": _16 * 3,
            "attention.output.dense": _16,
            "intermediate.dense": [(32, 16)],
            "output.dense": [(16, 32)],
        }
    },
}
assert list(EXPECTED) == ARCHITECTURES


def expected_groups(name):
    groups = {}
    for (stack, layers), shapes in EXPECTED[name].items():
        for role, of_role in shapes.items():
            groups[f"{stack}.*.{role}"] = of_role if isinstance(of_role, tuple) else (of_role, layers)
    return groups


def described(groups):
    return {group.key: (group.shapes, group.num_layers) for group in groups}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacks_and_groups(name):
    model = ancestry(name).model
    assert [(stack, len(blocks)) for stack, blocks in find_stacks(model).items()] == list(EXPECTED[name])
    assert described(group_matrices(Anatomy.of(model).matrices)) == expected_groups(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_what_recurs(name):
    """As suffixes or in full, PEFT finds the matrices of the groups of two layers or more, and no others."""
    model = ancestry(name).model
    targets = Anatomy.of(model).default_targets
    shapes = {key: matrix_shape(module) for key, module in model.named_modules()}
    matched = {key for key in shapes if any(key == t or key.endswith(f".{t}") for t in targets) and shapes[key]}
    groups = group_matrices(Anatomy.of(model).matrices)
    assert matched == {m.name for group in groups if group.num_layers > 1 for m in group.matrices}


@pytest.mark.parametrize("kind", ["add", "generate", "lora"])
@pytest.mark.parametrize("name", ["sd3", "sana", "gpt2", "llama"])
def test_wrapped_models_have_the_same_groups(name, kind):
    model = ancestry(name).model
    plain = described(group_matrices(Anatomy.of(model).matrices))
    targets = Anatomy.of(model).default_targets
    config = LoraConfig(target_modules=targets) if kind == "lora" else WAVEConfig(mode=kind)
    wrapped = get_peft_model(model, config).get_base_model()
    assert described(group_matrices(Anatomy.of(wrapped).matrices)) == plain
    assert Anatomy.of(wrapped).default_targets == targets


def test_without_sharing_q_k_and_v_are_groups_of_their_own():
    apart = described(group_matrices(Anatomy.of(ancestry("dit").model).matrices, share_qkv=False))
    assert [apart[f"transformer_blocks.*.attn1.to_{x}"] for x in "qkv"] == [(_16, 3)] * 3


def test_keys_and_values_of_another_width_are_not_fused_with_queries():
    model = ancestry("pixart").model
    for block in model.transformer_blocks:
        block.attn2.to_k, block.attn2.to_v = nn.Linear(12, 16), nn.Linear(12, 16)
    keys = described(group_matrices(Anatomy.of(model).matrices))
    assert keys["transformer_blocks.*.attn2.to_q"] == (_16, 2)
    assert keys["transformer_blocks.*.attn2.to_k+to_v"] == ([(16, 12)] * 2, 2)


def test_tied_embedders_are_no_matrices_of_a_block():
    tied, copies = ancestry("dit").model, ancestry("dit").model
    for block in tied.transformer_blocks[1:]:
        block.norm1.emb = tied.transformer_blocks[0].norm1.emb
    assert Anatomy.of(tied).matrices == Anatomy.of(copies).matrices
    assert not any("emb" in matrix.role for matrix in Anatomy.of(copies).matrices)


def test_modules_in_no_stack_are_groups_of_their_own():
    model = ancestry("dit").model
    groups = Anatomy.of(model).groups_of(["proj_out_1", "proj_out_2", "transformer_blocks.0.ff.net.2", "pos_embed"])
    keys = {group.key: group.num_layers for group in groups}
    assert keys == {"proj_out_1": 1, "proj_out_2": 1, "transformer_blocks.*.ff.net.2": 1}


@pytest.mark.parametrize("name", ["dit", "flux", "vit"])
@pytest.mark.parametrize("part", ["matrices", "default_targets"])
def test_a_model_of_one_block_repeats_nothing(name, part):
    one = stock(ancestry(name).model, **depth(name, 1))
    assert find_stacks(one) == {}
    with pytest.raises(ValueError, match=f"{type(one).__name__} has no repeated blocks"):
        getattr(Anatomy.of(one), part)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ModuleList()])
def test_lists_of_layers_are_no_blocks(model):
    with pytest.raises(ValueError, match="no repeated blocks"):
        _ = Anatomy.of(model).matrices


def test_stack_inside_a_block_belongs_to_the_block():
    """The two linear layers of DiT's FFN lie in a ModuleList of their own."""
    assert list(find_stacks(ancestry("dit").model)) == ["transformer_blocks"]
    assert list(find_stacks(nn.ModuleDict({"a": MODELS["mlp"]().model, "b": MODELS["mlp"]().model}))) == [
        "a.blocks",
        "b.blocks",
    ]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (Conv1D(5, 3), (5, 3)),
        (nn.Conv2d(3, 5, 1), (5, 3)),
        (nn.Conv2d(3, 5, 3), None),
        (nn.Conv2d(4, 4, 1, groups=2), None),
        (nn.Embedding(5, 3), None),
        (nn.LayerNorm(3), None),
    ],
)
def test_matrices_as_they_are_stored(module, shape):
    assert matrix_shape(module) == shape
    if shape:
        stacked = torch.stack([module.weight, 2 * module.weight])
        matrices = weight_to_matrix(stacked, form_of(module))
        assert matrices.shape == (2, *shape)
        assert torch.equal(matrix_to_weight(matrices, form_of(module)), stacked)
        x = torch.randn(2, 3, 1, 1) if isinstance(module, nn.Conv2d) else torch.randn(2, 3)
        torch.testing.assert_close(module(x).flatten(1), x.flatten(1) @ matrices[0].T + module.bias)


def test_blocks_of_a_tied_dit_count_their_embedder_once():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, num_embeds_ada_norm=10)
    assert {matrix.layer for matrix in Anatomy.of(model).matrices} == {0, 1}
    assert not any(".emb." in matrix.name for matrix in Anatomy.of(model).matrices)
