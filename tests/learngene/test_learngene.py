# SPDX-License-Identifier: Apache-2.0
"""Condense and descend: what a descendant computes, what it trains, and what is refused."""

import copy
import warnings
from typing import get_args

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ancestries import ARCHITECTURES, ancestry, depth, each_method, learngene, lossless, select_layers, stock, width
from diffusers_learngene import Learngene, WAVEConfig
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.nodes import TracingError
from diffusers_learngene.anatomy.tensors import tensors_of
from diffusers_learngene.functional.resize import DepthInit, resize_depth
from diffusers_learngene.initializers import scratch
from diffusers_learngene.learngene.layout import parse_group_key, resize_tensors
from diffusers_learngene.training.condensing import ElasticModel
from models import MODELS, run


def close(actual, expected, tolerance=1e-4):
    """To `tolerance` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def descend(name, one: Learngene | str = "wave", **overrides):
    """A descendant of `one`, or of the lossless learngene of that method, also of a width it was not condensed for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this learngene holds no scalers for the width")
        return (learngene(name, one) if isinstance(one, str) else one).descend(**overrides).eval()


def tile_position_table(model, name, factor):
    """DiT's and PixArt's position tables are fixed sines of every width's own: put the tiled one instead."""
    if name in ("dit", "pixart"):
        model.pos_embed.pos_embed = ancestry(name).model.pos_embed.pos_embed.repeat(1, 1, factor)


# ------------------------------------------------------------------------------------------------ what it computes


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lossless_descendant_is_the_ancestry(name, tmp_path, method):
    tiny = ancestry(name)
    descendant = descend(name, method)
    output = run(descendant, tiny.inputs)
    close(output, tiny())
    assert torch.equal(run(descend(name, method), tiny.inputs), output)  # deterministic

    plain = descendant.merge_and_unload()
    assert type(plain) is type(tiny.model) and plain.state_dict().keys() == tiny.model.state_dict().keys()
    close(run(plain, tiny.inputs), output, 1e-6)
    plain.save_pretrained(tmp_path)
    loaded = type(tiny.model).from_pretrained(tmp_path).eval()
    close(run(loaded, tiny.inputs), output, 1e-6)


@pytest.mark.parametrize("start", ["layers", "fit"])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "llama"])
def test_default_templates_hold_two_layers(name, start):
    """As many templates as two layers have numbers: of a model of two layers, nothing is lost."""
    tiny = ancestry(name)
    tiny.model = stock(tiny.model, **depth(name, 2))
    if name == "dit":
        tiny.model.transformer_blocks[1].norm1.emb = copy.deepcopy(tiny.model.transformer_blocks[0].norm1.emb)
    expected = tiny()
    one = Learngene.condense(tiny.model, start=start)
    close(run(descend(name, one), tiny.inputs), expected)


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layers", [2, 5])
def test_depth(name, layers, method):
    inputs = ancestry(name).inputs
    descendant = descend(name, method, **depth(name, layers))
    reference = select_layers(name, depth(name, layers))
    close(run(descendant, inputs), run(reference, inputs))
    assert descendant.merge_and_unload().state_dict().keys() == reference.state_dict().keys()


@each_method
@pytest.mark.parametrize(("name", "factor"), [("dit", 2), *((name, 3) for name in ARCHITECTURES)])
def test_growing_in_width_preserves_the_function(name, factor, method):
    tiny = ancestry(name)
    descendant = descend(name, method, **width(name, factor))
    tile_position_table(descendant, name, factor)
    expected = tiny()
    output = run(descendant, tiny.inputs)
    if output.shape != expected.shape:  # the hidden states themselves
        expected = expected.repeat(1, 1, factor)
    if name == "gpt2":  # its table of tokens is tied to the head, where it sums over channels `factor` times as often
        expected = expected * factor
    close(output, expected)


@each_method
@pytest.mark.parametrize("name", ["sd3", "lumina2", "llama"])
def test_growing_in_width_and_depth(name, method):
    descendant = descend(name, method, **width(name, 2), **depth(name, 5))
    inputs = ancestry(name).inputs
    close(run(descendant, inputs), run(select_layers(name, depth(name, 5)), inputs))


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cutting_the_width(name, method):
    """Half of the width, with another depth: runs, in the shape of a stock model of that size."""
    overrides = {**width(name, 0.5), **depth(name, 4)}
    descendant = descend(name, method, **overrides)
    reference = stock(ancestry(name).model, **overrides)
    expected = run(reference, ancestry(name).inputs)
    output = run(descendant, ancestry(name).inputs)
    assert output.shape == expected.shape and output.isfinite().all()
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in descendant.merge_and_unload().state_dict().items()} == shapes


@each_method
def test_grown_weights_are_tiles(method):
    """Whole heads, adaLN's modulations and the halves of the FFN are repeated; inputs are divided by how often."""
    narrow = ancestry("dit").model
    wide = descend("dit", method, num_attention_heads=4).merge_and_unload()
    old, new = narrow.transformer_blocks[1], wide.transformer_blocks[1]
    close(new.attn1.to_q.weight, old.attn1.to_q.weight.repeat(2, 2) / 2)
    shift, *others = old.norm1.linear.weight.chunk(6)
    close(new.norm1.linear.weight.chunk(6)[0], shift.repeat(2, 2) / 2)
    close(new.norm1.linear.weight.chunk(6)[5], others[4].repeat(2, 2) / 2)
    close(new.ff.net[2].weight, old.ff.net[2].weight.reshape(16, 4, 16).repeat(2, 1, 2).flatten(1) / 2)


def test_unknown_width_warns_and_a_known_one_does_not():
    model = ancestry("dit").model
    one = Learngene.condense(model, widths=[{"num_attention_heads": 1}, {}, {"num_attention_heads": 1}])
    assert one.config.widths == [{}, {"num_attention_heads": 1}]  # each once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for overrides in (
            {},
            {"num_layers": 5},
            {"num_attention_heads": 1},
            {"num_layers": 2, "num_attention_heads": 1},
        ):
            one.descend(**overrides)
    with pytest.warns(UserWarning, match=r"no scalers for the width of {'num_attention_heads': 3}"):
        one.descend(num_attention_heads=3)


def test_a_width_that_was_condensed_for_has_tensors_of_its_own():
    one = Learngene.condense(ancestry("dit").model, widths=[{"num_attention_heads": 1}])
    resized = resize_tensors(one.size_tensors(0), one.layouts[0], one.layouts[1], one.bank)
    assert resized.keys() == one.size_tensors(1).keys()
    assert all(torch.equal(one.size_tensors(1)[key], value) for key, value in resized.items())
    one.tensors["sizes.1.shared.proj_out_2.bias"] += 1
    inputs = ancestry("dit").inputs
    assert not torch.equal(
        run(descend("dit", one, num_attention_heads=1), inputs),
        run(descend("dit", Learngene.condense(ancestry("dit").model), num_attention_heads=1), inputs),
    )


@each_method
@pytest.mark.parametrize("name", ["dit", "sd3", "llama"])
def test_condensing_a_descendant_gives_the_learngene_back(name, method):
    one = learngene(name, method)
    plain = descend(name, method).merge_and_unload()
    again = Learngene.condense(plain, lossless(plain, method))
    assert again.config == one.config and again.tensors.keys() == one.tensors.keys()
    for key, value in again.tensors.items():
        if key.startswith("sizes.") and "scalers" not in key:
            torch.testing.assert_close(value, one.tensors[key])
    close(run(descend(name, again), ancestry(name).inputs), ancestry(name)())


@each_method
def test_a_layer_that_differs_comes_first(method):
    """SD3.5 has a second attention in its first blocks, whose adaLN is larger."""
    tiny = MODELS["sd3"]()
    tiny.model = stock(tiny.model, dual_attention_layers=(0,), num_layers=4)
    one = Learngene.condense(tiny.model, lossless(tiny.model, method))
    assert "transformer_blocks.*.norm1.linear#2" in one.config.bank_sizes
    close(run(descend("sd3", one), tiny.inputs), tiny())
    assert run(descend("sd3", one, num_layers=3), tiny.inputs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ancestry_in_half_precision(dtype):
    tiny = ancestry("pixart")
    tiny.model.to(dtype)
    one = Learngene.condense(tiny.model, lossless(tiny.model))
    assert {tensor.dtype for tensor in one.tensors.values()} == {torch.float32}
    reference = ancestry("pixart").model
    reference.load_state_dict(tiny.model.state_dict())
    close(run(descend("pixart", one), tiny.inputs), run(reference, tiny.inputs))


def test_condensing_leaves_the_ancestry_as_it_is():
    tiny = ancestry("dit")
    before, output = {key: value.clone() for key, value in tiny.model.state_dict().items()}, tiny()
    one = Learngene.condense(tiny.model)
    one.descend(num_layers=2).get_base_model().transformer_blocks[0].ff.net[2].base_layer.bias.data.add_(1)
    after = tiny.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(tiny(), output)
    for key, tensor in one.tensors.items():  # nor does it share memory with the learngene
        assert not any(tensor.data_ptr() == value.data_ptr() for value in tensors_of(tiny.model).values()), key


def test_descendants_are_independent():
    one = learngene("vit")
    before = {key: value.clone() for key, value in one.tensors.items()}
    for parameter in descend("vit").parameters():
        parameter.data.add_(1)
    assert all(torch.equal(one.tensors[key], value) for key, value in before.items())


@each_method
@pytest.mark.parametrize("name", ["dit", "sd3", "gpt2"])
def test_what_training_added_to_a_known_initialisation(name, method, tmp_path):
    """W - W_init is all that has to be held; the initialisation is drawn again from its seed, for every depth."""
    tiny = ancestry(name)
    tiny.model = scratch(tiny.model, {}, seed=5).eval()
    draws = torch.Generator().manual_seed(0)
    for matrix in Anatomy.of(tiny.model).matrices:  # training adds the same to all layers
        weight = tiny.model.get_submodule(matrix.name).weight
        weight.data += 0.1 * torch.randn(weight.shape, generator=draws.manual_seed(len(matrix.role)))
    one = Learngene.condense(tiny.model, lossless(tiny.model, method), start="fit", init_seed=5)
    assert one.config.init_seed == 5
    close(run(descend(name, one), tiny.inputs), tiny())
    one.save_pretrained(tmp_path)
    loaded = Learngene.from_pretrained(tmp_path)
    sizes = [depth(name, 5), width(name, 0.5)]
    with_width = Learngene.condense(
        tiny.model, lossless(tiny.model, method), start="fit", init_seed=5, widths=sizes[1:]
    )
    elastic = ElasticModel(with_width, sizes).eval()
    for index, size in enumerate(sizes):
        output = run(descend(name, loaded, **size), tiny.inputs)
        close(run(descend(name, loaded, **size).merge_and_unload(), tiny.inputs), output)
        close(run(lambda size=index, **inputs: elastic(size, **inputs), tiny.inputs), output)
    with pytest.raises(ValueError, match=r"init_seed=6: the model was not initialised from it \(cosine -?0\.0"):
        Learngene.condense(tiny.model, lossless(tiny.model, method), init_seed=6)
    # The layers of another depth are those of the dense ancestry, whatever part of them was drawn from the seed.
    other = Learngene.condense(tiny.model, lossless(tiny.model, method))
    close(
        run(descend(name, loaded, **sizes[0]), tiny.inputs), run(descend(name, other, **sizes[0]), tiny.inputs), 1e-3
    )


@each_method
def test_a_random_start_keeps_what_starts_at_zero(method):
    """DiT's adaLN: every block starts as the identity, so that the depth does not matter yet."""
    tiny = ancestry("dit")
    tiny.model = scratch(tiny.model, {}).eval()
    nn.init.normal_(tiny.model.proj_out_2.weight)
    one = Learngene.condense(tiny.model, lossless(tiny.model, method), start="random")
    again, other = (
        Learngene.condense(tiny.model, lossless(tiny.model, method), start="random", seed=seed) for seed in (0, 1)
    )
    banks = [key for key in one.tensors if not key.startswith("sizes.")]
    assert all(torch.equal(one.tensors[key], again.tensors[key]) for key in one.tensors)
    assert not any(torch.equal(one.tensors[key], other.tensors[key]) for key in banks)
    for name, module in descend("dit", one).merge_and_unload().named_modules():
        if name.endswith("norm1.linear"):
            assert not module.weight.any()
        elif name.endswith(("to_q", "to_out.0", "net.0.proj", "net.2")):
            assert 0.5 < module.weight.std() / (2 / sum(module.weight.shape)) ** 0.5 < 2
    close(run(descend("dit", one), tiny.inputs), run(descend("dit", one, num_layers=5), tiny.inputs))


@each_method
@pytest.mark.parametrize("how", get_args(DepthInit))
def test_sigma_init(method, how):
    """Scalers of another depth as `resize_depth` makes them; everything else is selected as always."""
    one, overrides = learngene("dit", method), {"num_layers": 5}
    torch.manual_seed(0)
    tensors, _ = one.tensors_at(one.layout(one.config.override(overrides)), how)
    selected, _ = one.tensors_at(one.layout(one.config.override(overrides)))
    torch.manual_seed(0)
    for key, value in selected.items():
        entry = one.layouts[0].entries[key]
        if entry.group:
            gain = 3 / 5 if entry.ends else 1
            torch.testing.assert_close(tensors[key], gain * resize_depth(one.tensors[f"sizes.0.{key}"], 5, how))
        else:
            assert torch.equal(tensors[key], value)
    assert run(one.descend(sigma_init=how, **overrides), ancestry("dit").inputs).isfinite().all()
    with pytest.raises(ValueError, match="sigma_init='linar' must be one of 'nearest', 'interpolated'"):
        one.descend(sigma_init="linar", **overrides)


@each_method
def test_a_descendant_is_its_seeds_alone(method):
    """Whatever was drawn before; nor does it change what is drawn next. It comes in eval mode."""
    one, models, state = learngene("dit", method), [], torch.get_rng_state()
    for seed in (0, 0, 1):
        models.append(one.descend(sigma_init="random", seed=seed, num_layers=5))
        assert torch.equal(torch.get_rng_state(), state) and not any(m.training for m in models[-1].modules())
        torch.rand(1)
        state = torch.get_rng_state()
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], value) for key, value in again.items())
    assert any(not torch.equal(first[key], value) for key, value in other.items())


# ---------------------------------------------------------------------------------------------- what it is made of


@each_method
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_descendant_holds_and_trains(name, method):
    one = learngene(name, method)
    descendant = one.descend(**depth(name, 4))
    assert isinstance(descendant, PeftModel)
    assert not any(t.is_meta for t in (*descendant.parameters(), *descendant.buffers()))

    layout = one.layout(one.config.override(depth(name, 4)))
    tensors, bank = one.tensors_at(layout)
    parameters = dict(descendant.named_parameters())
    buffers = sum(
        tensors[key].numel() for key in tensors if list(layout.entries[key].names.values())[0] in buffers_of(name)
    )
    shared = [tensor for part in bank.values() for tensor in part.values()]
    size = sum(tensor.numel() for tensor in (*shared, *tensors.values())) - buffers
    assert sum(parameter.numel() for parameter in parameters.values()) == size  # no dense copy of anything

    scalers = {key for key in parameters if "_scaler." in key or "_sigma." in key}
    per_layer = {
        key.replace(".base_layer", "")
        for key, parameter in parameters.items()
        if parameter.ndim == 1 and parameter.numel() and any(f".{stack}." in key for stack in layout.depths)
        if ".norm1.emb." not in key  # DiT's tied embedder
    }
    trained = {key.replace(".base_layer", "") for key, parameter in parameters.items() if parameter.requires_grad}
    assert trained == scalers | per_layer and scalers and per_layer
    numel = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    assert numel == sum(
        tensors[key].numel()
        for key, entry in layout.entries.items()
        if layout.owns(key) and (entry.group or (len(entry.shape) == 1 and key in layout.stack_of))
    )


def buffers_of(name):
    return {key for key, _ in ancestry(name).model.named_buffers()}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_weights_stay_tied(name):
    def tied(model):
        pair = {
            "gpt2": lambda: (model.lm_head.weight, model.transformer.wte.weight),
            "t5": lambda: (model.shared.weight, model.encoder.embed_tokens.weight),
        }[name]()
        return pair[0] is pair[1]

    descendant = descend(name)
    assert tied(descendant.get_base_model()) and tied(descendant.merge_and_unload())


def test_a_dits_embedders_stay_tied():
    plain = descend("dit", num_layers=5).merge_and_unload()
    assert len({id(block.norm1.emb) for block in plain.transformer_blocks}) == 1


@each_method
def test_training_the_scalers_reaches_the_ancestry(method):
    """The point of the trainable parameters: gradients flow, and templates stay."""
    tiny = ancestry("vit")
    descendant = learngene("vit", method).descend(num_hidden_layers=2)
    templates = {key: t.clone() for key, t in descendant.named_parameters() if "bank" in key}
    optimizer = torch.optim.Adam([p for p in descendant.parameters() if p.requires_grad], lr=0.01)
    target, losses = tiny().detach(), []
    for _ in range(30):
        loss = nn.functional.mse_loss(run(descendant, tiny.inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    parameters = dict(descendant.named_parameters())
    assert templates and all(torch.equal(parameters[key], value) for key, value in templates.items())


def test_numbers():
    one = learngene("gpt2")
    assert one.num_parameters == sum(tensor.numel() for tensor in one.tensors.values())
    assert one.ancestry_parameters == sum(parameter.numel() for parameter in ancestry("gpt2").model.parameters())
    small = Learngene.condense(ancestry("gpt2").model, WAVEConfig(num_templates=1, template_size=4))
    assert small.num_parameters < one.num_parameters
    assert small.config.bank_sizes["transformer.h.*.mlp.c_fc"] == [1, 4, 4]


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({"target_modules": ["to_q", "to_v"]}, ["attn1.to_q+to_v"]),
        ({"target_modules": ["to_q", "to_k"], "share_qkv": False}, ["attn1.to_q", "attn1.to_k"]),
        ({"target_modules": r".*ff\.net.*"}, ["ff.net.0.proj", "ff.net.2"]),
        (
            {"exclude_modules": ["norm1.linear", "to_k", "net.2"]},
            ["attn1.to_q+to_v", "attn1.to_out.0", "ff.net.0.proj"],
        ),
        ({"target_modules": "all-linear", "exclude_modules": r".*(attn1|ff).*"}, ["norm1.linear"]),
        ({"mode": "add", "target_modules": ["ff.net.2"]}, ["ff.net.2"]),
    ],
)
def test_targets(fields, groups):
    """Matrices that are not targeted stay dense, and other depths work."""
    one = Learngene.condense(ancestry("dit").model, WAVEConfig(template_size=8, num_templates=12, **fields))
    assert list(one.config.bank_sizes) == [f"transformer_blocks.*.{group}" for group in groups]
    descendant = descend("dit", one, num_layers=4)
    factored = {
        key.split(".", 4)[4].split(".learngene")[0] for key, _ in descendant.named_parameters() if "scaler" in key
    }
    assert factored == {role for group in groups for role in parse_group_key(f"x.*.{group}")[1]}
    assert run(descendant, ancestry("dit").inputs).isfinite().all()


# ------------------------------------------------------------------------------------------------ what is refused


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["to_q"]))


def with_nan(model):
    model.proj_out_2.bias.data[0] = float("nan")
    return model


def with_a_layer_more(model):
    model.extra = nn.Linear(2, 2)
    return model


def with_own_embedders(_):
    return MODELS["dit"]().model


def quantised(model):
    weight = model.proj_out_1.weight.data.to(torch.int8)
    model.proj_out_1.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, "carries PEFT layers: call merge_and_unload"),
        (lambda model: lora(model).get_base_model(), "carries PEFT layers"),
        (lambda model: stock(model, num_layers=1), "DiTTransformer2DModel has no repeated blocks"),
        (lambda _: MODELS["mlp"]().model, "architecture='MLP' is not a model class"),
        (lambda _: nn.Linear(2, 2), "is not a model class"),
        (with_nan, "proj_out_2.bias of the model is quantised, or holds NaN"),
        (quantised, "proj_out_1.weight of the model is quantised"),
        (with_a_layer_more, r"not what its config makes: only the model has \['extra.bias', 'extra.weight'\]"),
        (with_own_embedders, "the embedders of its blocks differ"),
        (lambda _: MODELS["deit"]().model, r"only its config \['pooler.dense.*add_pooling_layer"),
    ],
)
def test_models_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Learngene.condense(change(ancestry("dit").model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template_size": 17}, r"17 x 17 is larger than the .* weight of transformer_blocks\.0"),
        ({"template_size": (8, 64)}, "is larger than the"),
        ({"num_templates": 10_000}, "cannot be independent"),
        ({"template_size": 16, "num_templates": 200}, "num_templates=200 is more than the .* that .* tiles"),
        ({"target_modules": ["nothing"]}, r"target_modules=\{'nothing'\} matches no matrix"),
        (
            {"target_modules": r"transformer_blocks\.1\..*"},
            r"leaves out transformer_blocks\.0\..*all of its layers, or none",
        ),
        ({"layers_to_transform": [0, 1]}, "a learngene is made of all layers"),
        ({"bias": "all"}, "a learngene keeps whatever is not factored"),
        ({"modules_to_save": ["proj_out_2"]}, "a learngene keeps whatever is not factored"),
        ({"tensors_to_save": ["proj_out_2.bias"]}, "a learngene keeps whatever is not factored"),
        ({"freeze_bank": True}, "freeze_bank=True: a learngene keeps whatever is not factored"),
        ({"template_pattern": {"ff": [1, 2, 2]}}, r"template_pattern names the groups \['ff'\], but this model has"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Learngene.condense(ancestry("dit").model, WAVEConfig(**fields), start="fit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 2}, r"DiTTransformer2DModel has no config key 'layers'. Its sizes are: .*num_layers"),
        ({"num_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"num_layers": -2}, "num_layers=-2"),
        ({"num_layers": 2.0}, "num_layers=2.0"),
        ({"num_layers": True}, "num_layers=True"),
        ({"num_layers": "2"}, "num_layers='2'"),
        ({"num_layers": 10**9}, "num_layers=1000000000 is out of range"),
        ({"attention_head_dim": 16}, "heads of 16 instead of 8"),
        ({"num_embeds_ada_norm": 5}, "only depth and width can change"),
        ({"patch_size": 1}, "only depth and width can change"),
        ({"in_channels": 3}, "only depth and width can change"),
        ({"out_channels": 3}, "only depth and width can change"),
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm' must be left as it is"),
        ({"num_layers": 1}, "'transformer_blocks' would have fewer than two blocks that share: the least depth is 2"),
    ],
)
@pytest.mark.parametrize("use", ["descend", "widths"])
def test_sizes_that_are_refused(overrides, message, use):
    with pytest.raises(ValueError, match=message):
        if use == "descend":
            learngene("dit").descend(**overrides)
        else:
            Learngene.condense(ancestry("dit").model, widths=[overrides])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("bert", {"hidden_size": 18}, "heads of 9 instead of 8"),
        (
            "vit",
            {"num_attention_heads": 3},
            "hidden_size=16 with num_attention_heads=3 makes no whole attention heads",
        ),
        ("gpt2", {"n_embd": 20}, "heads of 10 instead of 8"),
        ("llama", {"num_attention_heads": 3, "hidden_size": 24}, "not a multiple of num_key_value_heads=2"),
        ("flux", {"num_single_layers": 1}, "'single_transformer_blocks' would have fewer than two blocks"),
    ],
)
def test_sizes_that_do_not_work_out(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        learngene(name).descend(**overrides)


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux"])
def test_fused_projections(name):
    """They are in no config, and beside the tensors that they are made of; also once they are unfused, in some."""
    model = ancestry(name).model
    model.fuse_qkv_projections()
    refused = r"the projections of .*attn.* are fused.*call unfuse_qkv_projections\(\), or load the model again"
    with pytest.raises(ValueError, match=refused):
        Learngene.condense(model)
    model.unfuse_qkv_projections()
    if name == "flux":
        close(run(Learngene.condense(model, lossless(model)).descend(), ancestry(name).inputs), ancestry(name)())
        return
    with pytest.raises(ValueError, match=refused):
        Learngene.condense(model)


def test_no_class_of_its_own():
    class DiT(DiTTransformer2DModel):
        pass

    model = DiT(num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8)
    with pytest.raises(ValueError, match="architecture='DiT' is not a model class"):
        Learngene.condense(model)


def test_what_a_call_has_shown_is_recorded_for_descendants(monkeypatch, tmp_path):
    """Where a block cannot be followed, one call of the ancestry tells its descendants what to scale, by the file."""
    tiny, overrides = ancestry("dit"), {"num_layers": 5}
    expected = Learngene.condense(tiny.model).descend(**overrides).merge_and_unload()

    def stubborn(block):
        raise TracingError("its forward cannot be followed (here)")

    monkeypatch.setattr("diffusers_learngene.anatomy.kinds.trace", stubborn)
    with pytest.warns(UserWarning, match="BasicTransformerBlock: .* cannot be followed.*condense"):
        blind = Learngene.condense(tiny.model)
    assert blind.config.watched_ends == {}
    Learngene.condense(tiny.model, inputs=tiny.inputs).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Learngene.from_pretrained(tmp_path).descend(**overrides).merge_and_unload()
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
