# SPDX-License-Identifier: Apache-2.0
"""Models as data: what goes into a config, what comes out of one, and what a config may not do."""

import random
import time

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from ancestries import ARCHITECTURES, ancestry
from diffusers_learngene.anatomy.models import (
    check_config,
    empty_model,
    enable_gradient_checkpointing_,
    model_class,
    model_config,
    new_model,
)
from diffusers_learngene.anatomy.tensors import tensors_of
from models import MODELS


DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_embeds_ada_norm": 10}
BERT = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_empty_model_has_the_tensors_of_the_model_and_no_memory(name):
    model = ancestry(name).model
    config = model_config(model)
    empty = empty_model(type(model).__name__, config)
    assert model_config(empty) == config  # the round trip
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    if name != "dit":  # whose embedders are tied in the empty model
        assert {key: t.shape for key, t in tensors_of(empty).items()} == {
            k: t.shape for k, t in tensors_of(model).items()
        }
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in empty.named_buffers())


@pytest.mark.parametrize("name", ["gpt2", "t5", "dit"])
def test_ties_survive(name):
    model = empty_model(type(ancestry(name).model).__name__, model_config(ancestry(name).model))
    ids = {
        "gpt2": lambda: (model.lm_head.weight, model.transformer.wte.weight),
        "t5": lambda: (model.shared.weight, model.encoder.embed_tokens.weight),
        "dit": lambda: [block.norm1.emb.timestep_embedder.linear_1.weight for block in model.transformer_blocks],
    }[name]()
    assert len({id(parameter) for parameter in ids}) == 1


@pytest.mark.parametrize("name", ["sd3", "llama"])
def test_config_is_data_about_the_shape_only(name, tmp_path):
    ancestry(name).model.save_pretrained(tmp_path)
    model = type(ancestry(name).model).from_pretrained(tmp_path)
    config = model_config(model)
    assert str(tmp_path) not in str(config)
    assert not any(key.startswith("_") or key in ("dtype", "architectures") for key in config)


def test_config_leaves_out_what_is_no_shape():
    model = ancestry("t5").model
    model.config.task_specific_params = {"translation": {"prefix": "translate English to German: "}}
    model.config.auto_map = {"AutoModel": "me/code--model.Model"}
    assert model_config(model) == model_config(ancestry("t5").model)


@pytest.mark.parametrize(
    "name",
    ["Nothing", "ModelMixin.from_pretrained", "os", "DDPMScheduler", "AutoModel", "BertConfig", "", "a b", None, 3],
)
def test_only_public_model_classes(name):
    with pytest.raises(ValueError, match="is not a model class"):
        model_class(name)
    assert model_class("DiTTransformer2DModel") is DiTTransformer2DModel


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"_attn_implementation": "eager"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "me/kernel"}, "_attn_implementation_internal"),
        ({"text_config": {"_name_or_path": "x"}}, "_name_or_path"),
        ({"text_config": {"auto_map": {}}}, "auto_map"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation"),
        ({"backbone": "resnet50"}, "backbone"),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone"),
        ({"encoder": "hf-hub:me"}, "encoder"),
        ({"vocab_file": "..\\secret"}, "vocab_file"),
        ({"names": ["a", "/etc/passwd"]}, "names"),
        ({"dtype": "float16"}, "dtype"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"n_layer": 10**5}, "n_layer"),
        ({"depths": [2, 10**6]}, "depths"),
        ({"num_attention_heads": 10**30}, "num_attention_heads"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"block_out_channels": [1] * 5000}, "block_out_channels"),
        ({"num_attention_heads": 2**31}, "num_attention_heads"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 2**30}, "vocab_size"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
        ({"sample_size": 2**31}, "sample_size"),
        ({"image_size": [16, 2**20]}, "image_size"),
        ({"window_size": -4}, "window_size"),
        ({"num_layers": True}, "num_layers"),
        ({"num_layers": 2.5}, "num_layers"),
        ({"depths": [2, -1]}, "depths"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ],
)
def test_configs_that_are_refused(change, named):
    with pytest.raises(ValueError, match=rf"base_config: '?{named}"):
        check_config({**DIT, **change})
    with pytest.raises(ValueError, match=named):
        empty_model("DiTTransformer2DModel", {**DIT, **change})


@pytest.mark.parametrize("name", list(MODELS)[3:])
def test_configs_of_real_models_are_not_refused(name):
    check_config(model_config(MODELS[name]().model))
    check_config({"id2label": {"0": "black/white", "1": "a: b"}, "label2id": {"black/white": 0}})


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("DiTTransformer2DModel", {**DIT, "sample_size": 100_000, "patch_size": 1}),
        ("SD3Transformer2DModel", {"num_layers": 1, "pos_embed_max_size": 100_000}),
        ("Lumina2Transformer2DModel", {"num_layers": 1, "axes_lens": [2**31, 512, 512]}),
        ("DiTTransformer2DModel", {**DIT, "num_attention_heads": 2**31}),
        ("DiTTransformer2DModel", {**DIT, "num_attention_heads": "2"}),
        ("DiTTransformer2DModel", {**DIT, "patch_size": 0}),
        ("DiTTransformer2DModel", {**DIT, "norm_type": "none"}),
        ("DiTTransformer2DModel", {**DIT, "activation_fn": {"a": 1}}),
        ("DiTTransformer2DModel", {**DIT, "unknown": 1}),
        ("BertModel", {**BERT, "hidden_size": 15}),
        ("BertModel", {**BERT, "hidden_act": "nothing"}),
        ("BertModel", {**BERT, "num_hidden_layers": None}),
        ("BertModel", {**BERT, "id2label": 3}),
    ],
)
def test_impossible_models_are_refused_before_there_is_memory_for_them(architecture, config):
    start = time.process_time()
    with pytest.raises(
        ValueError, match=f"{architecture} cannot be built from this config|base_config: .* is out of range"
    ):
        empty_model(architecture, config)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["dit", "vit"])
def test_gradient_checkpointing(name):
    model = ancestry(name).model
    enable_gradient_checkpointing_(model)
    assert model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        enable_gradient_checkpointing_(torch.nn.Linear(1, 1))


def test_new_model_draws_as_its_class_does():
    torch.manual_seed(0)
    drawn = DiTTransformer2DModel(**DIT).state_dict()
    torch.manual_seed(0)
    again = new_model("DiTTransformer2DModel", DIT).state_dict()
    assert all(torch.equal(again[key], value) for key, value in drawn.items())


def test_tensors_are_named_once_and_buffers_only_if_they_are_saved():
    gpt2, sd3, dit = (ancestry(name).model for name in ("gpt2", "sd3", "dit"))
    assert "transformer.wte.weight" in tensors_of(gpt2) and "lm_head.weight" not in tensors_of(gpt2)
    assert "pos_embed.pos_embed" in tensors_of(sd3) and "pos_embed.pos_embed" not in tensors_of(dit)
    assert set(tensors_of(sd3)) == set(sd3.state_dict())


@pytest.mark.parametrize("name", ["dit", "vit"])
def test_random_states_are_left_alone(name):
    model = ancestry(name).model
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    empty_model(type(model).__name__, model_config(model))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
