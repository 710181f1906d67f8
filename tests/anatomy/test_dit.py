# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.dit import (
    DIT_SIZES,
    create_dit,
    disable_label_dropout_,
    drop_labels,
    init_dit_weights_,
    set_frequency_shift_,
    tie_dit_embedders_,
)
from diffusers_learngene.learngene.closed_form import check_ancestry


CONFIG = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs(model):
    images = torch.randn(3, 1, 8, 8, generator=generator())
    with torch.no_grad():
        return model(images, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 9, 10])).sample


def trained(model):
    """A model whose output is not zero."""
    draws = generator(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model


@pytest.fixture
def tied():
    return trained(create_dit(generator=generator(), **CONFIG))


def test_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        counts = {
            size: sum(p.numel() for p in tie_dit_embedders_meta(size).parameters()) for size in ("S", "B", "L", "XL")
        }
    # facebookresearch/DiT, learned variances, without the fixed position table
    assert {size: round(count / 1e6) for size, count in counts.items()} == {"S": 33, "B": 130, "L": 458, "XL": 675}


def tie_dit_embedders_meta(size):
    model = DiTTransformer2DModel(**DIT_SIZES[size], out_channels=8)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return model


def test_a_new_dit_is_the_zero_function_and_a_function_of_the_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = create_dit(generator=generator(), **CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    assert not outputs(model).any()
    weights, again = model.state_dict(), create_dit(generator=generator(), **CONFIG).state_dict()
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    fused = torch.cat([weights[f"transformer_blocks.1.attn1.to_{role}.weight"] for role in "qkv"])
    bound = (6 / (16 + 48)) ** 0.5  # xavier of the fused (48, 16) matrix
    assert 0.95 * bound < fused.abs().max() <= bound
    embedding = weights["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"]
    assert embedding.std() == pytest.approx(0.02, rel=0.2)


def test_sizes_take_overrides():
    model = create_dit("S", num_layers=1, sample_size=4)
    assert (model.config.num_layers, model.config.num_attention_heads) == (1, 6)


@pytest.mark.parametrize(("arguments", "message"), [({"size": "M"}, "size='M'"), ({"depth": 3}, r"\['depth'\]")])
def test_create_dit_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_dit(**arguments)


def test_tying_changes_parameters_but_not_the_function():
    untied = init_dit_weights_(DiTTransformer2DModel(**CONFIG), generator())
    draws = generator(1)
    for name, parameter in untied.named_parameters():
        if "norm1.emb" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    expected, count = outputs(untied.eval()), untied.num_parameters()
    tied = tie_dit_embedders_(untied)
    assert torch.equal(outputs(tied), expected)
    embedder = sum(p.numel() for p in tied.transformer_blocks[0].norm1.emb.parameters())
    assert tied.num_parameters() == count - 2 * embedder
    assert tie_dit_embedders_(tied) is tied and len(tied._state_dict_hooks) == 1  # idempotent


def test_a_saved_folder_is_a_stock_folder(tied, tmp_path):
    tied.save_pretrained(tmp_path)
    stock, info = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(stock), outputs(tied.eval()))
    assert torch.equal(outputs(tie_dit_embedders_(stock)), outputs(tied))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_tied_and_writable(tied, duplicate, tmp_path):
    twin = duplicate(tied)
    assert len({id(block.norm1.emb) for block in twin.transformer_blocks}) == 1
    twin.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight.data += 1
    twin.save_pretrained(tmp_path)
    stock = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(stock), outputs(twin.eval()))
    assert not torch.equal(outputs(twin), outputs(tied.eval()))


def test_state_dict_holds_copies_unless_the_parameters_are_wanted(tied):
    key = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"
    written, live = tied.state_dict(), tied.state_dict(keep_vars=True)
    assert written[key.format(0)].data_ptr() != written[key.format(2)].data_ptr()
    assert live[key.format(0)] is live[key.format(2)]
    inside = nn.ModuleDict({"dit": tied}).state_dict()
    assert len({tensor.data_ptr() for tensor in inside.values()}) == len(inside)


def test_tying_refuses_copies_that_differ(tied, tmp_path):
    tied.save_pretrained(tmp_path)
    stock = DiTTransformer2DModel.from_pretrained(tmp_path)
    stock.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias.data[3] += 0.5
    with pytest.raises(
        ValueError, match=r"up to 0\.5 in transformer_blocks\.2\.norm1\.emb\.timestep_embedder\.linear_2"
    ):
        tie_dit_embedders_(stock)
    with pytest.raises(ValueError, match=r"up to 0\.5"):
        tied.load_state_dict(stock.state_dict())


def test_frequency_shift_is_the_one_of_the_original_code(tied):
    with_1 = outputs(tied.eval())
    embedding = set_frequency_shift_(tied, 0).transformer_blocks[1].norm1.emb.time_proj(torch.tensor([7.0]))
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    expected = torch.cat([torch.cos(7 * frequencies), torch.sin(7 * frequencies)])
    torch.testing.assert_close(embedding[0], expected, atol=1e-5, rtol=0)
    assert not torch.equal(outputs(tied), with_1)
    assert torch.equal(outputs(set_frequency_shift_(tied, 1)), with_1)
    with pytest.raises(ValueError, match="shift=2"):
        set_frequency_shift_(tied, 2)


def test_stock_label_dropout_is_drawn_per_block_and_ours_is_off():
    stock = DiTTransformer2DModel(**CONFIG).train()
    seen = []
    for block in stock.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        embedder.embedding_table.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    labels = torch.arange(400) % 10
    call = {"timestep": torch.zeros(400), "class_labels": labels}
    stock(torch.zeros(400, 1, 8, 8), **call)
    assert not torch.equal(seen[0], seen[1])  # the trap
    seen.clear()
    disable_label_dropout_(stock)(torch.zeros(400, 1, 8, 8), **call)
    assert all(torch.equal(ids, labels) for ids in seen)


def test_drop_labels_draws_once_per_sample():
    labels = torch.arange(10_000) % 10
    dropped = drop_labels(labels, 0.1, 10, generator())
    assert torch.equal(dropped, drop_labels(labels, 0.1, 10, generator()))
    assert (dropped == 10).float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert torch.equal(drop_labels(labels, 0, 10), labels) and (drop_labels(labels, 1, 10) == 10).all()
    with pytest.raises(ValueError, match=r"probability=1\.5"):
        drop_labels(labels, 1.5, 10)


def test_condensing_warns_of_frequencies_that_no_config_records():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ancestry(Anatomy.of(create_dit(**CONFIG)))
    with pytest.warns(UserWarning, match=r"shift \[0\], .* Call set_frequency_shift_"):
        check_ancestry(Anatomy.of(set_frequency_shift_(create_dit(**CONFIG), 0)))
