# SPDX-License-Identifier: Apache-2.0
"""KIND as a learngene: taken apart by class, taught new ones, and absorbed again."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ancestries import ancestry
from diffusers_learngene import FINEConfig, KINDConfig, Learngene, WAVEConfig, class_gate
from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.blocks import group_matrices
from diffusers_learngene.anatomy.dit import create_dit, join_label_rows_
from diffusers_learngene.initializers import scratch
from models import MODELS


NULL = 10  # of the tiny DiT
ROWS = "base_model.model.transformer_blocks.0.norm1.emb.class_embedder.embedding_table.parametrizations.weight.0.rows"


def close(actual, expected, tolerance=1e-5):
    """To `tolerance` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def call(model, labels):
    """A DiT's output for samples that differ in noise and class only by their place in the batch."""
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))[: len(labels)]
    timestep = torch.arange(len(labels)) * 50
    with torch.no_grad():
        return model.eval()(noise, timestep=timestep, class_labels=torch.tensor(labels)).sample


def condense(**fields):
    fields = {"num_learngene": 6, "tailors_per_class": 2} | fields
    return Learngene.condense(ancestry("dit").model, KINDConfig(**fields))


@pytest.fixture(scope="module")
def one():
    """Ten classes of two tailors each; not to be changed."""
    return condense()


def train_(model, labels, steps=4):
    """A few steps with momentum and weight decay, of an optimiser that is given all parameters."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        noise = torch.randn(len(labels), 4, 8, 8)
        output = model(noise, timestep=torch.arange(len(labels)) * 50 + step, class_labels=torch.tensor(labels)).sample
        nn.functional.mse_loss(output, torch.randn_like(output)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def dense_models(model, opened, num_learngene):
    """Stock models of every class by hand: of the SVD of each fused matrix, the components that `opened` lists."""
    groups = [group for group in group_matrices(Anatomy.of(model).matrices) if group.num_layers > 1]
    made = {}
    for label, tailors in opened.items():
        other = made[label] = copy.deepcopy(model)
        on = [*range(num_learngene), *tailors]
        for group in groups:
            for layer in range(group.num_layers):
                names = [matrix.name for matrix in group.matrices if matrix.layer == layer]
                weights = [model.get_submodule(name).weight.data for name in names]
                u, sigma, vh = torch.linalg.svd(torch.cat(weights), full_matrices=False)
                parts = (u[:, on] * sigma[on] @ vh[on]).split([len(weight) for weight in weights])
                for name, part in zip(names, parts, strict=True):
                    other.get_submodule(name).weight.data.copy_(part)
    return made


# ----------------------------------------------------------------------------------------------------- W(c)


def test_weights_of_every_class():
    """Rounds of tailors: class c has the components 6 + c and 6 + 3 + c; a mixed batch is each sample with its own."""
    gate = {"class_groups": [[0, 4], [1], [9]]}
    model = ancestry("dit").model
    one = Learngene.condense(model, KINDConfig(num_learngene=6, tailors_per_class=2, **gate))
    assert one.config.class_tailors == [[0], [1], None, None, [0], None, None, None, None, [2]]
    assert set(map(tuple, one.config.bank_sizes.values())) == {(6, 6)}
    opened = {0: [6, 9], 4: [6, 9], 1: [7, 10], 9: [8, 11], NULL: []}
    dense = dense_models(model, opened, 6)
    labels = [0, 9, NULL, 1, 4, 1]
    descendant = one.descend()
    output = call(descendant, labels)
    for place, label in enumerate(labels):
        close(output[place], call(dense[label], labels)[place])
    for label in (2, 3, 5):
        with pytest.raises(ValueError, match=f"does not know the classes .{label}"):
            call(descendant, [0, label])


@pytest.mark.parametrize("name", ["dit", "sd3", "vit", "gpt2"])
def test_full_rank_is_exact(name):
    """As many components as a matrix has: nothing is lost where all of them are open."""
    tiny = ancestry(name)
    expected = tiny().detach()
    groups = [group for group in group_matrices(Anatomy.of(tiny.model).matrices) if group.num_layers > 1]
    sides = {group.key: min(sum(m1 for m1, _ in group.shapes), group.shapes[0][1]) for group in groups}
    sizes = {key: [side - 4, 4] for key, side in sides.items()}
    num_classes = NULL if name == "dit" else 2
    gate = [[1, 1]] + [[0, 1]] * (num_classes - 1)
    one = Learngene.condense(tiny.model, KINDConfig(class_gate=gate, group_sizes=sizes))
    model = one.descend().eval()
    with torch.no_grad(), class_gate(model, 0):
        output = model(**tiny.inputs)
    output = getattr(output, "sample", getattr(output, "logits", None))
    close(output, expected, 1e-4)
    with torch.no_grad(), class_gate(model, 1):
        other = model(**tiny.inputs)
    assert not torch.allclose(getattr(other, "sample", getattr(other, "logits", None)), output, atol=1e-4)


def test_a_fresh_model_with_zero_matrices():
    """The paper's start. DiT's adaLN is zero, and its components are random with sigma = 0: they can learn."""
    model = scratch(ancestry("dit").model, {}).eval()
    nn.init.normal_(model.proj_out_2.weight)
    one = Learngene.condense(model, KINDConfig(num_learngene=6, tailors_per_class=2))
    again = Learngene.condense(model, KINDConfig(num_learngene=6, tailors_per_class=2))
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in one.tensors.items())  # seeded
    assert not torch.equal(
        one.tensors["u.transformer_blocks.*.norm1.linear"],
        Learngene.condense(model, KINDConfig(num_learngene=6, tailors_per_class=2), seed=1).tensors[
            "u.transformer_blocks.*.norm1.linear"
        ],
    )
    sigma = one.tensors["sizes.0.scalers.transformer_blocks.*.norm1.linear"]
    assert sigma.shape == (3, 26) and not sigma.any()
    close(call(one.descend(), [0, 1, NULL]), call(model, [0, 1, NULL]))
    descendant = one.descend().train()
    noise = torch.randn(2, 4, 8, 8)
    descendant(
        noise, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([0, 1])
    ).sample.square().sum().backward()
    layer = descendant.get_base_model().transformer_blocks[0].norm1.linear
    open_now = layer.learngene_kind_sigma["default"].weight.grad.ne(0)
    assert open_now.nonzero().flatten().tolist() == [*range(6), 6, 7, 16, 17]


def test_everything_is_trainable(one):
    assert all(parameter.requires_grad for parameter in one.descend().parameters() if parameter.numel())


# --------------------------------------------------------------------------------------------------- fewer classes


def linear_flops(model, rank, labels=4, tokens=16):
    """Of the factored matrices, by hand; q, k and v are one, as in the paper."""
    matrices = [group for group in group_matrices(Anatomy.of(model).matrices) if group.num_layers > 1]
    total = 0
    for group in matrices:
        rows = labels if "norm1" in group.key else labels * tokens
        total += 2 * rows * rank * (sum(m1 for m1, _ in group.shapes) + group.shapes[0][1]) * group.num_layers
    return total


def test_fewer_classes_are_a_smaller_model(one):
    full, small = one.descend(), one.descend(classes=[7, 3])
    labels = [3, 7, NULL, 3]
    close(call(small, labels), call(full, labels), 1e-6)
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (full, small)]
    assert numbers == [
        sum(p.numel() for p in ancestry_parameters(26)),
        sum(p.numel() for p in ancestry_parameters(10)),
    ]
    counts = []
    for model in (full, small):
        with FlopCounterMode(display=False) as counter:
            call(model, labels)
        counts.append(counter.get_total_flops())
    model = ancestry("dit").model
    assert counts[0] - counts[1] == linear_flops(model, 26) - linear_flops(model, 10) > 0
    for label in (0, 9):
        with pytest.raises(ValueError, match="does not know the classes"):
            call(small, [label])


def ancestry_parameters(rank):
    """Empty tensors as a descendant of that rank has parameters."""
    model = ancestry("dit").model
    groups = [group for group in group_matrices(Anatomy.of(model).matrices) if group.num_layers > 1]
    factored = {f"{matrix.name}.weight" for group in groups for matrix in group.matrices}
    copies = tuple(f"transformer_blocks.{layer}.norm1.emb." for layer in (1, 2))  # tied in descendants
    for name, parameter in model.named_parameters():
        if name not in factored and not name.startswith(copies):
            yield parameter
    for group in groups:
        for _ in range(group.num_layers):
            yield torch.empty(rank * (sum(m1 for m1, _ in group.shapes) + group.shapes[0][1] + 1), device="meta")


def test_one_class_is_a_dense_model(one, tmp_path):
    model = one.descend(classes=[4])
    expected = call(one.descend(), [4] * 3)
    close(call(model, [4] * 3), expected, 1e-6)
    plain = model.merge_and_unload()
    assert type(plain) is type(ancestry("dit").model)
    assert plain.state_dict().keys() == ancestry("dit").model.state_dict().keys()
    close(call(plain, [4] * 3), expected)
    plain.save_pretrained(tmp_path)
    close(call(type(plain).from_pretrained(tmp_path), [4] * 3), expected)
    with pytest.raises(RuntimeError, match="depends on the class"):
        one.descend(classes=[4, 5]).merge_and_unload()


def test_learngenes_only(one):
    """Every class is then what the null class is, but for its label's embedding."""
    model = one.descend(classes=[])
    close(call(model, [NULL] * 3), call(one.descend(), [NULL] * 3), 1e-6)
    plain = model.merge_and_unload()
    close(call(plain, [NULL] * 3), call(one.descend(), [NULL] * 3))


def test_selecting_twice_is_selecting_once(one):
    twice, once = one.select([1, 5, 8]).select([8, 1]), one.select([1, 8])
    assert twice.config == once.config and once.config.class_tailors[8] == [1]
    assert all(torch.equal(twice.tensors[key], tensor) for key, tensor in once.tensors.items())
    assert one.config.bank_sizes["transformer_blocks.*.ff.net.2"] == [6, 20]  # left as it was


def test_selecting_shared_and_several_tailors():
    """A class opens two units, of which it shares one; its tailors come along, but not its siblings."""
    gate = [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], *([[0, 0, 0, 0]] * 7)]
    one = Learngene.condense(ancestry("dit").model, KINDConfig(num_learngene=6, class_gate=gate))
    assert one.config.class_tailors[:4] == [[0, 3], [1, 3], [2], []]
    some = one.select([1, 3])
    assert some.config.class_tailors[:4] == [None, [0, 1], None, []]
    close(call(some.descend(), [1, 3, NULL]), call(one.descend(), [1, 3, NULL]), 1e-6)
    with pytest.raises(ValueError, match="does not know the classes"):
        call(some.descend(), [0])


# ----------------------------------------------------------------------------------------------------- new classes


@pytest.mark.parametrize("classes", [None, [7, 3], []])
@pytest.mark.parametrize("label_init", ["null", "mean"])
def test_new_classes_start_as_the_learngene(one, classes, label_init):
    """With its own label row; ids 10, 11 and 12, and 13 is the null class."""
    model = one.descend(classes=classes, num_new_classes=3, label_init=label_init)
    old = one.descend(classes=classes)
    base = model.get_base_model()
    assert base.config.num_embeds_ada_norm == 13
    before = one.tensors["sizes.0.shared.transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
    table = base.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    row = before[10] if label_init == "null" else before[:10].mean(0)
    assert torch.equal(table[:10], before[:10]) and torch.equal(table[13], before[10])
    close(table[10:13], row.expand(3, -1))
    if label_init == "null":
        assert torch.equal(call(model, [12, 10, 11, 13]), call(old, [NULL] * 4))
    known = [3, 7, 3] if classes is None else [c for c in classes for _ in range(2)]
    assert torch.equal(call(model, [*known, 13]), call(old, [*known, NULL]))
    if classes is not None:
        with pytest.raises(ValueError, match="does not know the classes"):
            call(model, [10, 0])


def test_only_new_tailors_and_rows_are_trained(one):
    model = one.descend(num_new_classes=3)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    novel = {name for name, _ in model.named_parameters() if ".novel." in name}
    assert trainable == novel | {ROWS}
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    groups = [group for group in group_matrices(Anatomy.of(ancestry("dit").model).matrices) if group.num_layers > 1]
    sides = sum((sum(m1 for m1, _ in g.shapes) + g.shapes[0][1] + 1) * g.num_layers for g in groups)
    assert count == 6 * sides + 3 * 16
    labels = [0, 3, 9, 13]
    expected = call(model, labels)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    new_before = call(model, [10, 11, 12])
    train_(model.train(), [10, 11, 12, 2, 13])
    assert torch.equal(call(model, labels), expected)  # bit for bit
    assert torch.equal(call(one.descend(), [0, 3, 9, NULL]), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trainable), name
    assert not torch.allclose(call(model, [10, 11, 12]), new_before, atol=1e-3)


@pytest.mark.parametrize("per_class", [None, 1, 3, 4])
@pytest.mark.parametrize("classes", [None, [2], []])
def test_absorbing_new_classes(one, classes, per_class, tmp_path):
    model = one.descend(classes=classes, num_new_classes=2, tailors_per_class=per_class)
    train_(model, [10, 11])
    wider = one.absorb(model)
    each = 2 if per_class is None else per_class
    old = 10 if classes is None else len(classes)
    assert set(map(tuple, wider.config.bank_sizes.values())) == {(6, 2 * old + 2 * each)}
    wider.save_pretrained(tmp_path)
    loaded = Learngene.from_pretrained(tmp_path)
    assert loaded.config == wider.config
    labels = [10, 11, 12, *([0, 2, 9] if classes is None else classes)]
    close(call(loaded.descend(), labels), call(model, labels))
    close(call(loaded.descend(classes=[11]).merge_and_unload(), [11, 11]), call(model, [11, 11]))
    further = loaded.descend(classes=[11], num_new_classes=1)  # and so on
    close(call(further, [11, 12, 11]), call(loaded.descend(), [11, 12, 11]))
    assert loaded.absorb(further).config.class_tailors[10] is None


def test_absorbing_all_that_was_trained(one):
    model = train_(one.descend(), [0, 1, 5, NULL])
    again = one.absorb(model)
    assert again.config == one.config and again.tensors.keys() == one.tensors.keys()
    assert torch.equal(call(again.descend(), [0, 5, 8, NULL]), call(model, [0, 5, 8, NULL]))
    assert not torch.allclose(call(one.descend(), [0]), call(model, [0]), atol=1e-3)
    small = train_(one.descend(classes=[5]), [5, NULL])
    assert torch.equal(call(one.absorb(small).descend(), [5, NULL]), call(small, [5, NULL]))
    assert torch.equal(call(one.absorb(small.get_base_model()).descend(), [5]), call(small, [5]))


@pytest.mark.parametrize("config", [WAVEConfig(), FINEConfig()])
def test_absorbing_with_other_methods(config):
    one = Learngene.condense(ancestry("dit").model, config)
    model = train_(one.descend(), [0, 1])
    again = one.absorb(model)
    assert again.tensors.keys() == one.tensors.keys()
    assert torch.equal(call(again.descend(), [0, 5]), call(model, [0, 5]))
    close(call(again.descend(num_layers=5), [0]), call(again.descend(num_layers=5), [0]))
    with pytest.raises(ValueError, match="no descendant of this learngene that has the size"):
        one.absorb(one.descend(num_layers=2))
    with pytest.raises(ValueError, match="no descendant of this learngene"):
        condense().absorb(model)


def test_a_new_class_can_become_a_stock_model(one, tmp_path):
    model = train_(one.descend(classes=[], num_new_classes=1), [10, 10])
    expected = call(model, [10, 10])
    plain = join_label_rows_(model.merge_and_unload())
    close(call(plain, [10, 10]), expected)
    plain.save_pretrained(tmp_path)
    close(call(type(plain).from_pretrained(tmp_path), [10, 10]), expected)


def test_new_tailors_are_seeded(one):
    models = [one.descend(num_new_classes=1, seed=seed) for seed in (0, 0, 1)]
    banks = [next(p for name, p in model.named_parameters() if name.endswith("novel.u")) for model in models]
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


# ---------------------------------------------------------------------------------------------- models without labels


@pytest.mark.parametrize("name", ["sd3", "vit"])
def test_models_without_labels(name, tmp_path):
    tiny = ancestry(name)

    def output(model, classes):
        with torch.no_grad(), class_gate(model, classes):
            made = model.eval()(**tiny.inputs)
        return getattr(made, "sample", getattr(made, "logits", None))

    one = Learngene.condense(tiny.model, KINDConfig(num_learngene=4, tailors_per_class=1, num_classes=3))
    one.save_pretrained(tmp_path)
    one = Learngene.from_pretrained(tmp_path)
    full = one.descend()
    close(output(one.descend(classes=[2]), [2, 3]), output(full, [2, 3]))
    model = one.descend(num_new_classes=2)
    full.requires_grad_(False)  # torch.matmul rounds in another order where an operand requires gradients
    assert torch.equal(output(model, [3, 5]), output(full, [3, 3]))
    assert torch.equal(output(model, [0, 2]), output(full, [0, 2]))
    assert all(".novel." in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    for name, parameter in model.named_parameters():
        if name.endswith("novel.weight"):
            nn.init.normal_(parameter)
    wider = one.absorb(model)
    assert wider.config.class_tailors == [[0], [1], [2], [3], [4]]
    close(output(wider.descend(), [3, 1]), output(model, [3, 1]))
    with pytest.raises(ValueError, match="does not know the classes"):
        output(one.descend(classes=[2]), [0, 2])


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [10]}, r"10 is no class id from 0 to 9"),
        ({"classes": [-1]}, "-1 is no class id"),
        ({"classes": [True]}, "True is no class id"),
        ({"classes": [1.0]}, "1.0 is no class id"),
        ({"classes": ["1"]}, "'1' is no class id"),
        ({"classes": 3}, "classes=3 must be a list"),
        ({"classes": "3"}, "classes='3' must be a list"),
        ({"classes": {3}}, "must be a list"),
        ({"classes": [3, 3]}, "names a class twice"),
        ({"num_new_classes": -1}, "num_new_classes=-1 must be a whole number"),
        ({"num_new_classes": True}, "num_new_classes=True"),
        ({"num_new_classes": 2.0}, "num_new_classes=2.0"),
        ({"num_new_classes": 1, "tailors_per_class": 0}, "tailors_per_class=0"),
        ({"tailors_per_class": 2}, "tailors_per_class=2 is of new classes"),
        ({"num_new_classes": 1, "label_init": "zero"}, "label_init='zero' must be one of"),
        ({"num_layers": 5}, "would change the size, but layers share nothing in KIND"),
        ({"num_attention_heads": 1}, "would change the size, but layers share nothing in KIND"),
        ({"num_layers": 5, "classes": [1]}, "would change the size"),
        ({"num_embeds_ada_norm": 11}, "only depth and width can change"),
        ({"layers": 3}, "no config key 'layers'"),
        ({"sigma_init": "random"}, "sigma_init='random': this learngene has one depth"),
    ],
)
def test_descendants_that_are_refused(one, arguments, message):
    with pytest.raises(ValueError, match=message):
        one.descend(**arguments)


def test_unknown_classes_stay_unknown(one):
    with pytest.raises(ValueError, match=r"does not know class 4, only \[2\]"):
        one.select([2]).descend(classes=[4])
    one.descend(num_layers=3)  # it has three


@pytest.mark.parametrize("config", [WAVEConfig(), FINEConfig()])
@pytest.mark.parametrize("arguments", [{"classes": [1]}, {"num_new_classes": 1}])
def test_other_methods_have_no_classes(config, arguments):
    with pytest.raises(ValueError, match="only a learngene of KIND has classes"):
        Learngene.condense(ancestry("dit").model, config).descend(**arguments)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"num_classes": 4}, {}, "class_tailors has 4 classes, but the model has labels for 10"),
        ({"num_classes": 0}, {}, "must be a list with an entry for every class"),
        ({"class_gate": [[1, 0]] * 10}, {}, "those after 1 are nobody's"),
        ({"class_gate": [[0, 1]] * 10}, {}, "some of them belong to no class"),
        ({"class_gate": [[0, 0]] * 10}, {}, "cannot fall into the 0 units"),
        ({"num_learngene": 17}, {}, "num_learngene=17 is more than the smaller side"),
        ({}, {"start": "layers"}, "start='layers' must be one of 'fit'"),
        ({}, {"start": "random"}, "start='random' must be one of 'fit'"),
        ({}, {"init_seed": 0}, "init_seed=0: KIND"),
        ({}, {"widths": [{"num_attention_heads": 1}]}, "would change the size"),
    ],
)
def test_condensing_that_is_refused(fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        Learngene.condense(ancestry("dit").model, KINDConfig(**fields), **arguments)


def test_a_model_without_labels_says_no_number_of_classes():
    with pytest.raises(ValueError, match="num_classes is not given"):
        Learngene.condense(MODELS["pixart"]().model, KINDConfig())


def test_groups_of_different_numbers_of_tailors():
    """A class gets as many new ones in each as an old class has; one number would not keep the proportions."""
    sizes = {"transformer_blocks.*.ff.net.2": [4, 40], "transformer_blocks.*.norm1.linear": [16, 0]}
    one = condense(group_sizes=sizes)
    model = train_(one.descend(num_new_classes=1), [10])
    wider = one.absorb(model)
    assert wider.config.bank_sizes["transformer_blocks.*.ff.net.2"] == [4, 44]
    assert wider.config.bank_sizes["transformer_blocks.*.norm1.linear"] == [16, 0]
    close(call(wider.descend(), [10, 4, 11]), call(model, [10, 4, 11]))
    with pytest.raises(ValueError, match="groups have different numbers"):
        one.descend(num_new_classes=1, tailors_per_class=3)


def test_a_large_model_on_the_meta_device_is_not_needed():
    """`create_dit` and KIND's own defaults: half the side, and a 64th for each class."""
    model = create_dit(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, sample_size=8, num_embeds_ada_norm=3
    )
    assert set(map(tuple, Learngene.condense(model, KINDConfig()).config.bank_sizes.values())) == {(32, 3)}
