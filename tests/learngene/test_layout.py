# SPDX-License-Identifier: Apache-2.0
"""Where tensors live: stacked, unstacked, and resized."""

import pytest
import torch

from ancestries import ARCHITECTURES, ancestry, depth, each_method, learngene, width
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.blocks import find_stacks, group_matrices
from diffusers_learngene.anatomy.models import empty_model, model_config, prepare_ancestry_
from diffusers_learngene.anatomy.tensors import tensors_of
from diffusers_learngene.functional.resize import relative_layers
from diffusers_learngene.learngene.layout import layout_of, match, parse_group_key, resize_tensors, stack, unstack


def keys_of(model):
    return [group.key for group in group_matrices(Anatomy.of(model).matrices) if group.num_layers > 1]


def layout_at(name, method="wave", **overrides):
    config = learngene(name, method).config
    return config.layout(config.override(overrides))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
def test_every_tensor_has_one_place(name, factored):
    model = prepare_ancestry_(ancestry(name).model)
    layout = layout_of(Anatomy.of(model), keys_of(model) if factored else ())
    names = [tensor for entry in layout.entries.values() for tensor in entry.names.values()]
    assert sorted(names) == sorted(tensors_of(model))
    assert layout.depths == {key: len(blocks) for key, blocks in find_stacks(model).items()}
    for key, entry in layout.entries.items():
        kind, _, rest = key.partition(".")
        assert kind == ("shared" if key not in layout.stack_of else "scalers" if entry.group else "layers")
        if kind == "shared":
            assert entry.names == {0: rest} and not entry.ends
        else:
            stack_of = layout.stack_of[key]
            path = rest.partition("#")[0].removeprefix(f"{stack_of}.*.") + (".weight" if entry.group else "")
            assert entry.names == {layer: f"{stack_of}.{layer}.{path}" for layer in entry.names}
            assert list(entry.names) == sorted(entry.names)
    factored_names = {name for entry in layout.entries.values() if entry.group for name in entry.names.values()}
    groups = group_matrices(Anatomy.of(model).matrices)
    targets = {f"{m.name}.weight" for group in groups if group.num_layers > 1 for m in group.matrices}
    assert factored_names == (targets if factored else set()) and Anatomy.of(model).default_targets


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacking_and_unstacking_is_the_identity(name):
    model = prepare_ancestry_(ancestry(name).model)
    layout = layout_of(Anatomy.of(model))
    state = unstack(stack(tensors_of(model), layout), layout)
    tensors = tensors_of(model)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unstacking_composes_the_weights(name, method):
    """A lossless learngene unstacks into the weights of its ancestry, in the layout of each kind of layer."""
    one = learngene(name, method)
    state = unstack(one.size_tensors(0), one.layouts[0], one.bank)
    for key, tensor in tensors_of(prepare_ancestry_(ancestry(name).model)).items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5)


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_size_changes_nothing(name, method):
    one = learngene(name, method)
    tensors = one.size_tensors(0)
    same = resize_tensors(tensors, one.layouts[0], layout_at(name, method), one.bank)
    assert tensors.keys() == same.keys() and all(torch.equal(same[key], value) for key, value in tensors.items())


@each_method
@pytest.mark.parametrize("name", ["dit", "flux", "t5"])
@pytest.mark.parametrize("layers", [2, 5])
def test_another_depth_is_an_index_and_a_gain(name, layers, method):
    one = learngene(name, method)
    target = layout_at(name, method, **depth(name, layers))
    resized = resize_tensors(one.size_tensors(0), one.layouts[0], target, one.bank)
    for key, value in one.size_tensors(0).items():
        entry = target.entries[key]
        if key not in target.stack_of or len(entry.names) == 1:  # T5's first layer alone has a table of positions
            assert torch.equal(resized[key], value)
        else:
            source = one.layouts[0].depths[target.stack_of[key]]
            gain = source / layers if entry.ends else 1
            gain = min(1, gain) if name == "bert" else gain
            torch.testing.assert_close(resized[key], value[relative_layers(source, layers)] * gain)


def test_one_tensor_of_a_special_layer_stays_with_it():
    """SD3's last block modulates its context by less than the others do."""
    entries = layout_at("sd3", num_layers=5).entries
    assert list(entries["scalers.transformer_blocks.*.norm1_context.linear"].names) == [0, 1, 2, 3]
    assert list(entries["layers.transformer_blocks.*.norm1_context.linear.bias#2"].names) == [4]


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_widths_keep_the_variants_of_a_tensor_apart(factor):
    """At three times the width, the bias of SD3's last block is as long as the others' at one."""
    one = learngene("sd3")
    source, target = one.layouts[0], layout_at("sd3", **width("sd3", factor))
    assert match(source, source) == {key: key for key in source.entries}
    assert match(source, target) is None
    wide = resize_tensors(one.size_tensors(0), source, target, one.bank)
    key = "layers.transformer_blocks.*.norm1_context.linear.bias"
    for variant, count in ((key, 6), (f"{key}#2", 2)):
        narrow = one.tensors[f"sizes.0.{variant}"].reshape(-1, count, 16)
        torch.testing.assert_close(
            wide[variant].reshape(-1, count, factor, 16), narrow[:, :, None].expand(-1, -1, factor, -1)
        )


@pytest.mark.parametrize(
    ("name", "overrides", "tensor"),
    [
        ("dit", {"num_embeds_ada_norm": 20}, "class_embedder"),
        ("dit", {"patch_size": 4}, "pos_embed.proj.weight"),
        ("dit", {"in_channels": 8}, "pos_embed.proj.weight"),
        ("dit", {"in_channels": 8, "num_attention_heads": 6}, "pos_embed.proj.weight"),
        ("sd3", {"joint_attention_dim": 24}, "context_embedder.weight"),
        ("vit", {"patch_size": 2}, "position_embeddings"),
        ("vit", {"image_size": 16}, "position_embeddings"),
        ("gpt2", {"vocab_size": 50}, "wte"),
    ],
)
def test_only_depth_and_width_can_change(name, overrides, tensor):
    """Whatever a config says: the tensors decide. (`override_config` knows most of these by their names.)"""
    one = learngene(name)
    target = one.layout({**one.config.base_config, **overrides})
    with pytest.raises(ValueError, match=f"{tensor}.* would go from .*: only depth and width can change"):
        resize_tensors(one.size_tensors(0), one.layouts[0], target, one.bank)


def test_another_architectures_tensors():
    dit, pixart = learngene("dit"), learngene("pixart")
    with pytest.raises(ValueError, match="no tensor for .*: it was condensed from another architecture"):
        resize_tensors(dit.size_tensors(0), dit.layouts[0], pixart.layouts[0], dit.bank)


@each_method
def test_everything_is_differentiable(method):
    one = learngene("dit", method)
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in one.tensors.items()}
    target = layout_at("dit", method, num_layers=4, num_attention_heads=4)
    tensors, bank = one.with_tensors(leaves).tensors_at(target)
    sum(value.sum() for value in unstack(tensors, target, bank).values()).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize(
    ("key", "stack_name", "roles"),
    [
        ("blocks.*.attn.to_q+to_k+to_v", "blocks", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("a.b.*.up#2", "a.b", ["up"]),
        ("head", "", ["head"]),
        ("blocks.*.q+k", "blocks", ["q", "k"]),
    ],
)
def test_group_keys(key, stack_name, roles):
    assert parse_group_key(key) == (stack_name, roles)


def test_empty_models_have_the_layout_of_full_ones():
    model = prepare_ancestry_(ancestry("flux").model)
    empty = empty_model("FluxTransformer2DModel", model_config(model))
    full = layout_of(Anatomy.of(model), keys_of(model))
    assert list(layout_of(Anatomy.of(empty), keys_of(model)).entries) == list(full.entries)
