# SPDX-License-Identifier: Apache-2.0
"""Configs of other sizes: what follows the depth and the width, and what may not be changed."""

import pytest
import torch
import transformers

from ancestries import ARCHITECTURES, ancestry, depth, width
from diffusers_learngene import Learngene
from diffusers_learngene.anatomy.models import empty_model, model_config
from diffusers_learngene.anatomy.sizes import depth_key, override_config, size_overrides, width_overrides


DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_embeds_ada_norm": 10}
BERT = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_overrides_are_the_configs_own_keys(name):
    model = ancestry(name).model
    config = model_config(model)
    for overrides in ({}, depth(name, 4), width(name, 2), {**depth(name, 2), **width(name, 0.5)}):
        assert override_config(type(model).__name__, config, overrides) == {**config, **overrides}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 3}, r"no config key 'layers'. Its sizes are: .*hidden_size.*num_hidden_layers"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be a positive integer"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers=-1"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers=2\.0"),
        ({"num_hidden_layers": True}, r"num_hidden_layers=True"),
        ({"num_hidden_layers": "2"}, r"num_hidden_layers='2'"),
        ({"num_hidden_layers": None}, r"num_hidden_layers=None"),
        ({"num_hidden_layers": [2]}, r"num_hidden_layers=\[2\]"),
        ({"hidden_act": "relu"}, r"hidden_act='relu' must be left as it is"),
        ({"is_decoder": True}, r"is_decoder=True must be left"),
        ({"hidden_size": 20}, r"heads of 10 instead of 8"),
        (
            {"hidden_size": 17},
            r"hidden_size=17 with num_attention_heads=2 makes no whole attention heads, which are 8",
        ),
        ({"num_attention_heads": 4}, r"heads of 4 instead of 8"),
    ],
)
def test_overrides_that_are_no_sizes(overrides, message):
    with pytest.raises(ValueError, match=message):
        override_config("BertModel", {**BERT, "hidden_act": "gelu", "is_decoder": False, "pad_token_id": 0}, overrides)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (DIT, {"attention_head_dim": 4}, "heads of 4 instead of 8"),
        ({"n_embd": 16, "n_head": 2}, {"n_head": 4}, "heads of 4 instead of 8"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, {"num_attention_heads": 3}, "num_key_value_heads=2"),
        ({"depths": [2, 2]}, {"depths": [2, -1]}, "depths"),
        ({"depths": [2, 2]}, {"depths": 2}, "depths"),
    ],
)
def test_heads_stay_whole(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        override_config("Model", config, overrides)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"num_key_value_heads": None, "n_inner": None}, {"n_inner": 5}),
        ({"depths": [2, 2]}, {"depths": [2, 2, 6]}),
        ({"depths": [2, 2]}, {"depths": (1, 0)}),
        ({"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}, {"num_attention_heads": 3, "hidden_size": 20}),
    ],
)
def test_sizes_of_other_kinds(config, overrides):
    assert override_config("Model", config, overrides) == {**config, **overrides}


def test_depth_and_heads():
    assert size_overrides(DIT, 6, 4) == {"num_layers": 6, "num_attention_heads": 4}
    assert size_overrides(DIT, 6, 2) == {"num_layers": 6}
    expected = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    assert width_overrides(BERT, 4) == expected
    assert depth_key({"n_layer": 3}) == "n_layer"
    with pytest.raises(ValueError, match="depth"):
        depth_key({"blocks": 3})


# ---------------------------------------------------------------------------------------- what follows the depth

DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MODERN = {**BERT, "num_hidden_layers": 4, "vocab_size": 40, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Qwen3", {**DECODER, "use_sliding_window": True}),
        ("Gemma2", {**DECODER, "query_pre_attn_scalar": 8}),
        ("Gemma3Text", {**DECODER, "query_pre_attn_scalar": 8}),
        ("SmolLM3", {**DECODER, "use_sliding_window": True, "no_rope_layers": [1, 0, 0, 1]}),
        ("ModernBert", {**MODERN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_every_layer_keeps_its_type(name, base):
    """Of the layer at the same relative depth, whose weights it has."""
    config = getattr(transformers, f"{name}Config")(**base, layer_types=TYPES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, "Gemma3TextModel" if name == "Gemma3Text" else f"{name}Model")(config).eval()
    one = Learngene.condense(model)
    for layers, sources in ((3, [0, 2, 3]), (7, [0, 1, 1, 2, 2, 3, 3])):
        descendant = one.descend(num_hidden_layers=layers).get_base_model()
        assert descendant.config.layer_types == [TYPES[source] for source in sources]
        if name == "SmolLM3":
            assert descendant.config.no_rope_layers == [[1, 0, 0, 1][source] for source in sources]
        ids = torch.arange(5, 17).reshape(2, 6)
        assert descendant.eval()(input_ids=ids).last_hidden_state.isfinite().all()


def test_given_lists_are_left_as_given():
    config = {"num_layers": 3, "layer_types": ["a", "b", "c"], "axes_dims_rope": [4, 4, 8]}
    assert override_config("Model", config, {"num_layers": 2}) == {
        "num_layers": 2,
        "layer_types": ["a", "c"],
        "axes_dims_rope": [4, 4, 8],
    }
    assert override_config("Model", config, {"num_layers": 3}) == config
    config = {"num_layers": 3, "num_kv_layers": [1, 2, 3]}
    assert override_config("Model", config, {"num_layers": 2, "num_kv_layers": [5, 6]})["num_kv_layers"] == [5, 6]


@pytest.mark.parametrize(
    ("indices", "layers", "expected"),
    [([0], 3, [0]), ([0, 1], 8, [0, 1, 2, 3]), ([0, 1, 2, 3], 2, [0, 1]), ([1, 2], 3, [1]), ([], 5, [])],
)
def test_indices_of_layers_follow_the_depth(indices, layers, expected):
    config = {"num_layers": 4, "dual_attention_layers": indices}
    assert override_config("Model", config, {"num_layers": layers})["dual_attention_layers"] == expected


@pytest.mark.parametrize("name", ["Dinov2", "Beit"])
def test_a_backbone_names_its_stages_itself(name):
    base = {**BERT, "image_size": 16, "patch_size": 4}
    kind = getattr(transformers, f"{name}Config")
    for given, old, new in ((None, [3], [6]), ([1, 3], [1, 3], [2, 6])):
        config = model_config(getattr(transformers, f"{name}Backbone")(kind(**base, out_indices=given)))
        assert config["out_indices"] == old
        made = empty_model(f"{name}Backbone", override_config("Model", config, {"num_hidden_layers": 6})).config
        assert list(made.out_indices) == new and len(made.stage_names) == 7
        assert made.out_features == [f"stage{index}" for index in new]


# ---------------------------------------------------------------------------------------------- heads stay whole

WHISPER = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2}
SWIN = {"embed_dim": 8, "num_heads": [2, 4], "depths": [2, 2], "hidden_size": 16}
SEGFORMER = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "depths": [2, 2]}
LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({"dim": 16, "n_heads": 2}, {"dim": 24}, "dim=24 .*heads of 12 instead of 8: dim must be 8 times n_heads"),
        ({"dim": 16, "n_heads": 2}, {"n_heads": 3}, "dim=16 with n_heads=3 makes no whole attention heads, .* 8 wide"),
        ({"hidden_size": 16, "n_head": 2}, {"hidden_size": 20}, "heads of 10 instead of 8"),
        ({"hidden_size": 16, "n_head": 2}, {"n_head": 1}, "heads of 16 instead of 8"),
        (WHISPER, {"d_model": 24}, "encoder_attention_heads=2 makes attention heads of 12 instead of 8"),
        (WHISPER, {"d_model": 24, "encoder_attention_heads": 3}, "decoder_attention_heads=2 .* heads of 12 instead"),
        (SWIN, {"embed_dim": 16}, "heads of 8 instead of 4: embed_dim must be 4 times num_heads"),
        (SWIN, {"num_heads": [2, 8]}, "embed_dim=8 with num_heads=.2, 8. makes attention heads of 2 instead of 4"),
        (SEGFORMER, {"hidden_sizes": [8, 32]}, "heads of 16 instead of 8"),
        (SEGFORMER, {"num_attention_heads": [3, 2]}, "makes no whole attention heads, which are 8 wide"),
        (LLAMA, {"num_key_value_heads": 1}, "makes 4 queries share a key instead of 2"),
        (LLAMA, {"num_key_value_heads": 4}, "makes 1 queries share a key instead of 2"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        (LLAMA, {"num_attention_heads": 8, "hidden_size": 64}, "makes 4 queries share a key instead of 2"),
    ],
)
def test_heads_by_every_name(config, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        override_config("Model", config, overrides)
    assert ".3" not in str(caught.value) and ".5" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"dim": 16, "n_heads": 2, "hidden_dim": 32}, {"dim": 32, "n_heads": 4, "hidden_dim": 64}),
        (WHISPER, {"d_model": 24, "encoder_attention_heads": 3, "decoder_attention_heads": 3}),
        (SWIN, {"embed_dim": 16, "num_heads": [4, 8]}),
        (SEGFORMER, {"hidden_sizes": [16, 32], "num_attention_heads": [2, 4]}),
        ({**LLAMA, "num_key_value_heads": 1}, {"hidden_size": 64, "num_attention_heads": 8}),
    ],
)
def test_whole_heads_by_every_name(config, overrides):
    assert override_config("Model", config, overrides) == {**config, **overrides}


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("patch_size", 4, 2),
        ("image_size", 16, 32),
        ("window_size", 4, 8),
        ("sliding_window", 4, 8),
        ("query_pre_attn_scalar", 8, 16),
        ("max_position_embeddings", 16, 32),
        ("axes_dims_rope", [4, 4, 8], [8, 4, 4]),
        ("strides", [4, 2], [2, 2]),
        ("norm_eps", 1e-6, 1e-5),
        ("rope_theta", 1e4, 1e6),
        ("rope_parameters", {"rope_type": "default"}, {"rope_type": "linear"}),
        ("hidden_act", "gelu", "relu"),
        ("attention_bias", False, True),
        ("dropout", 0.0, 0.1),
        ("is_causal", True, 1),
    ],
)
def test_what_is_neither_depth_nor_width_stays(key, old, new):
    config = {**BERT, key: old}
    assert override_config("Model", config, {key: old}) == config
    with pytest.raises(ValueError, match=f"{key}=.* must be left"):
        override_config("Model", config, {key: new})
