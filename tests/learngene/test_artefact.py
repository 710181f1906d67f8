# SPDX-License-Identifier: Apache-2.0
"""The file of a learngene: exact, atomic, and refused with the reason whatever else lies in it.

The oracle everywhere: reading ends in a learngene that works, or in a `LearngeneError` that names what is wrong; never
in another exception, a hang, or memory for sizes that are only claimed.
"""

import copy
import json
import os
import random
import re
import struct
import time
import tracemalloc
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from ancestries import ancestry, learngene, lossless, width
from diffusers_learngene import KINDConfig, Learngene, LearngeneError
from diffusers_learngene.hub import files
from forks import forked
from models import run


DIT = "transformer_blocks.*"
FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture(scope="module")
def one():
    """A learngene with everything that one can have."""
    model = ancestry("dit").model
    made = Learngene.condense(model, lossless(model), widths=[width("dit", 0.5)], ancestry="facebook/DiT-XL-2-256")
    made.config.condensed_for = [{}, {"num_layers": 6}, {"num_layers": 2, "num_attention_heads": 1}]
    return made


@pytest.fixture
def folder(one, tmp_path):
    one.save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return Learngene.from_pretrained(folder)


def assert_same(first, second):
    assert first.config == second.config and first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(second.tensors[key], tensor) for key, tensor in first.tensors.items())


def rewrite(folder, one, *, tensors=None, description=None, metadata=None):
    """A file with other tensors or another description, otherwise as `save_pretrained` writes it."""
    text = json.dumps(asdict(one.config) if description is None else description)
    metadata = {"learngene": text} if metadata is None else metadata
    stored = {key: value.contiguous() for key, value in (one.tensors if tensors is None else tensors).items()}
    save_file(stored, folder / "model.safetensors", metadata=metadata)


# --------------------------------------------------------------------------------------------------------- exact


def test_round_trip(one, folder):
    assert {path.name for path in folder.iterdir()} == FILES
    loaded = load(str(folder))
    assert_same(one, loaded)
    loaded.save_pretrained(folder / "again")
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    inputs = ancestry("dit").inputs
    for overrides in ({}, {"num_layers": 5}, {"num_attention_heads": 1}):
        assert torch.equal(
            run(loaded.descend(**overrides).eval(), inputs), run(one.descend(**overrides).eval(), inputs)
        )


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "gpt2", "llama"])
def test_round_trip_of_other_architectures(name, tmp_path):
    learngene(name).save_pretrained(tmp_path)
    assert_same(learngene(name), load(tmp_path))


def test_numbers_in_the_file_are_the_numbers_of_the_tensors(one, folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes) == one.num_parameters
    tensors = one.tensors.values()
    assert sum(tensor.numel() for tensor in tensors) == one.num_parameters
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_half_precision_in_the_file_is_read_as_fp32(one, folder):
    rewrite(folder, one, tensors={key: value.bfloat16() for key, value in one.tensors.items()})
    loaded = load(folder)
    assert all(torch.equal(loaded.tensors[key], value.bfloat16().float()) for key, value in one.tensors.items())


def test_config_json_and_card_say_the_same(one, folder):
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(asdict(one.config)))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers-learngene" and card.data.tags == ["learngene", "wave", "safetensors"]
    assert card.data.base_model == "facebook/DiT-XL-2-256"
    assert f"{one.num_parameters:,} parameters" in card.text and "num_layers=6" in card.text
    assert card.data.license is None and "None was recorded" in card.text  # its ancestry's terms apply


def test_card_says_what_it_is_told(one, tmp_path):
    told = copy.copy(one)
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"\x89PNG")
    told.card = {
        "results": [{"size": "B", "FID": 2.5}],
        "images": [str(picture), str(tmp_path / "lost.png"), str(tmp_path / "notes.txt")],
        "license": "mit",
        "training": {"steps": 7},
    }
    told.save_pretrained(tmp_path / "told")
    assert {path.name for path in (tmp_path / "told").iterdir()} == {*FILES, "samples.png"}
    card = ModelCard.load(tmp_path / "told" / "README.md")
    assert card.data.license == "mit" and "| B | 2.5 |" in card.text and "steps: `7`" in card.text
    assert (
        "![samples.png](samples.png)" in card.text and "lost.png" not in card.text and str(tmp_path) not in card.text
    )


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-256"),
        (None, None),
        ("/home/me/secret/model", None),
        ("models/ancestry/last", None),
        ("here/model", None),
        ("./model", None),
        ("~/model", None),
        ("C:\\models\\me", None),
        ("https://hf.co/me/x", None),
        ("bert-base-uncased", None),
    ],
)
def test_private_paths_are_not_recorded(given, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    made = Learngene.condense(ancestry("vit").model, ancestry=given)
    assert made.config.ancestry == recorded
    made.save_pretrained("out")
    assert ModelCard.load("out/README.md").data.base_model == recorded
    for file in FILES:
        assert recorded or not given or given.encode() not in (tmp_path / "out" / file).read_bytes()


# -------------------------------------------------------------------------------------------------------- atomic


def half_saved(connection, folder):
    """Write another artefact there, and stop in the middle."""

    def slowly(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(1000)
        connection.send("half")
        time.sleep(60)

    files.save_file = slowly
    one = Learngene.from_pretrained(folder)
    for tensor in one.tensors.values():
        tensor.zero_()
    one.save_pretrained(folder)


def test_killed_while_saving(one, folder):
    """SIGKILL in the middle of a write leaves the old artefact; the next save works."""
    process, connection = forked(half_saved, folder)
    assert connection.recv() == "half"
    process.kill()
    process.join()
    assert_same(one, load(folder))
    one.save_pretrained(folder)
    assert_same(one, load(folder))


@pytest.mark.parametrize("part", ["save_file", "fsync", "replace"])
def test_full_disk(one, folder, part, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if part == "save_file" else os, part, fail)
    changed = copy.copy(one)
    changed.tensors = {key: tensor + 1 for key, tensor in one.tensors.items()}
    with pytest.raises(OSError, match="No space left"):
        changed.save_pretrained(folder)
    monkeypatch.undo()
    assert_same(one, load(folder))
    assert {path.name for path in folder.iterdir()} == FILES  # no temporary is left


def test_files_can_be_read_by_others(folder):
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


# ------------------------------------------------------------------------------------------------------- refused


def nothing(folder):
    (folder / "model.safetensors").unlink()


def pickle_only(folder):
    torch.save({"a": torch.ones(1)}, folder / "model.bin")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    nothing(folder)


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder):
    torch.save({"a": torch.ones(1)}, folder / "model.safetensors")


def folder_instead(folder):
    nothing(folder)
    (folder / "model.safetensors").mkdir()


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def no_description(folder):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nothing, "holds no model.safetensors"),
        (pickle_only, "holds no model.safetensors: not a Learngene .pickles are never read"),
        (folder_instead, "holds no model.safetensors"),
        (empty, "cannot be read as safetensors"),
        (pickled, "cannot be read as safetensors"),
        (huge_header, "cannot be read as safetensors"),
        (no_description, "without the description"),
    ],
)
def test_files_that_are_no_learngenes(folder, spoil, message):
    spoil(folder)
    with pytest.raises(LearngeneError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "a b", ""])
def test_neither_folder_nor_repository(name):
    with pytest.raises(LearngeneError, match="neither a folder nor the id of a repository|holds no"):
        Learngene.from_pretrained(name)


def test_a_damaged_config_json_does_no_harm(one, folder):
    (folder / "config.json").write_text("{")
    assert_same(one, load(folder))


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(LearngeneError, match="download or copy it again"):
        load(folder)


SCALERS = f"sizes.0.scalers.{DIT}.attn1.to_q"
BIAS = f"sizes.1.layers.{DIT}.ff.net.2.bias"
TEMPLATES = f"templates.{DIT}.ff.net.2"


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(SCALERS), r"lacks the tensors \['sizes\.0\.scalers.*to_q'\]"),
        (without(TEMPLATES), r"lacks the tensors \['templates"),
        (
            lambda tensors: tensors.update({"sizes.0.shared.evil": torch.ones(1)}),
            r"unknown ones \['sizes.0.shared.evil'\]",
        ),
        (lambda tensors: tensors.update({"evil": torch.ones(1)}), r"unknown ones \['evil'\]"),
        (lambda tensors: tensors.update({"sizes.2.shared.a": torch.ones(1)}), r"widths=.* sizes \['0', '1', '2'\]"),
        (changed(SCALERS, lambda t: t[:2]), "'sizes.0.scalers.*to_q' has the shape"),
        (changed(SCALERS, lambda t: t[..., None]), "to_q' has the shape"),
        (changed(BIAS, lambda t: t.T), "bias' has the shape"),
        (changed(TEMPLATES, lambda t: t[1:]), "'templates.*' has the shape"),
        (changed(BIAS, lambda t: t.int()), "bias' is I32, not one of F32"),
        (changed(BIAS, lambda t: t.double()), "bias' is F64"),
        (changed(BIAS, lambda t: t.to(torch.float8_e4m3fn)), "bias' is F8_E4M3"),
        (changed(BIAS, lambda t: t.bool()), "bias' is BOOL"),
        (changed(BIAS, lambda t: t.fill_(float("nan"))), "bias' of .* holds NaN or infinity"),
        (changed(SCALERS, lambda t: t - float("inf")), "to_q' of .* holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(one, folder, spoil, message):
    tensors = {key: value.clone() for key, value in one.tensors.items()}
    spoil(tensors)
    rewrite(folder, one, tensors=tensors)
    with pytest.raises(LearngeneError, match=message):
        load(folder)


def deeply(levels):
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, r"format_version=2 is none of \(1,\): update diffusers-learngene"),
        ("format_version", True, "format_version=True"),
        ("format_version", "1", "format_version='1'"),
        ("format_version", None, "format_version=None"),
        ("method", "hydra", r"method='hydra' is none of .('wave', 'fine', 'kind').: update"),
        ("method", "fine", "must be .rank"),
        ("method", ["wave"], "method=.'wave'. is none of"),
        ("init_seed", -1, "init_seed=-1 must be a whole number"),
        ("init_seed", 2**63, "must be a whole number"),
        ("init_seed", "0", "init_seed='0' must be a whole number"),
        ("method", None, "method=None"),
        ("architecture", "Nothing", "architecture='Nothing' is not a model class"),
        ("architecture", "ModelMixin", "."),
        ("architecture", "AutoencoderKL", "."),
        ("architecture", "PixArtTransformer2DModel", "."),
        ("architecture", 3, "architecture=3 must be a str"),
        ("extra", 1, "has {'extra'}"),
        ("class_tailors", [[0]] * 10, "class_tailors=.* must be null: only KIND has classes"),
        ("class_tailors", [], "must be null"),
        ("class_tailors", False, "must be null"),
        ("watched_ends", [], "watched_ends=.. must map names to"),
        ("watched_ends", {"blocks.*.down.weight": [0.0]}, "watched_ends=.* must map names to"),
        ("watched_ends", {"blocks.*.down.weight": [0.5, False]}, "watched_ends=.* must map names to"),
        ("watched_ends", {"blocks.*.down.weight": [True, False]}, "watched_ends=.* must map names to"),
        ("ancestry", 5, "ancestry=5 must be a Hub id"),
        ("ancestry", "/etc/passwd", "ancestry='/etc/passwd'"),
        ("ancestry", "a/b\n---\nevil: 1", "ancestry"),
        ("ancestry", ["a/b"], "ancestry"),
        ("base_config", [], "base_config=.* must be a dict"),
        ("base_config", None, "base_config"),
        ("base_config", {}, "."),
        ("base_config.num_layers", 10**9, "num_layers=1000000000 is out of range"),
        ("base_config.num_layers", 300, "num_layers=300 is out of range"),
        ("base_config.num_layers", 4, "has the shape"),
        ("base_config.num_layers", "3", "num_layers"),
        ("base_config.num_layers", None, "cannot be built from this config"),
        ("base_config.num_layers", -1, "num_layers=-1 is out of range"),
        ("base_config.num_layers", 1, "'transformer_blocks' would have fewer than two blocks"),
        ("base_config.num_attention_heads", 10**9, "."),
        ("base_config.num_attention_heads", 10**12, "num_attention_heads=1000000000000 is out of range"),
        ("base_config.num_attention_heads", 0, "."),
        ("base_config.num_attention_heads", 2.5, "num_attention_heads"),
        ("base_config.attention_head_dim", 10**6, "."),
        ("base_config.sample_size", 10**6, "sample_size=1000000 is out of range"),
        ("base_config.patch_size", 0, "cannot be built from this config"),
        ("base_config.auto_map", {"AutoModel": "evil.Model"}, "'auto_map' is not allowed"),
        ("base_config.trust_remote_code", True, "'trust_remote_code' is not allowed"),
        ("base_config._attn_implementation", "eager", "'_attn_implementation' is not allowed"),
        ("base_config._attn_implementation_internal", "me/evil", "'_attn_implementation_internal' is not allowed"),
        ("base_config.attn_implementation", "me/evil", "attn_implementation='me/evil' is not allowed"),
        ("base_config.activation_fn", "../evil", "activation_fn='../evil' is not allowed"),
        ("base_config.unknown", 1, "cannot be built from this config: .*unknown"),
        ("base_config.norm_type", deeply(200), "."),
        ("base_config.norm_type", [0] * 10_000, "'norm_type' is out of range"),
        ("bank_sizes", [], "bank_sizes=.* must be a dict"),
        ("bank_sizes", {}, "."),
        (f"bank_sizes/{DIT}.ff.net.2", [64, 8, 16], "has the shape"),
        (f"bank_sizes/{DIT}.ff.net.2", [65, 8, 8], "more templates than numbers"),
        (f"bank_sizes/{DIT}.ff.net.2", [64, 8], "must be .templates, height, width"),
        (f"bank_sizes/{DIT}.ff.net.2", 64, "must be .templates, height, width"),
        (f"bank_sizes/{DIT}.ff.net.2", [0, 8, 8], "must be a whole number"),
        (f"bank_sizes/{DIT}.ff.net.2", [64.0, 8, 8], "must be a whole number"),
        (f"bank_sizes/{DIT}.ff.net.2", [True, 8, 8], "must be a whole number"),
        (f"bank_sizes/{DIT}.ff.net.2", ["64", 8, 8], "must be a whole number"),
        (f"bank_sizes/{DIT}.ff.net.2", [1, 2**30, 2**30], "more than"),
        (f"bank_sizes/{DIT}.nothing", [1, 8, 8], "bank_sizes names .*nothing"),
        ("bank_sizes/nothing", [1, 8, 8], "bank_sizes names .*nothing"),
        ("bank_sizes/", [1, 8, 8], "bank_sizes names"),
        ("widths", {}, "widths=.* must be a list"),
        ("widths", [], "widths=.* sizes"),
        ("widths", [{}], "widths=.* sizes"),
        ("widths", [{"num_attention_heads": 1}, {}], "widths=.* must begin with"),
        ("widths", [{}, {}], "has the shape"),
        ("widths", [{}, {"num_attention_heads": 4}], "has the shape"),
        ("widths", [{}, {"num_attention_heads": 1}, {}], "widths=.* sizes"),
        ("widths", [{}] * 100_000, "widths=.* sizes"),
        ("widths", [{}, {"num_attention_heads": 10**8}], "."),
        ("widths", [{}, {"num_layers": 3000}], "num_layers=3000 is out of range"),
        ("widths", [{}, {"heads": 1}], "no config key 'heads'"),
        ("widths", [{}, {"num_attention_heads": "1"}], "num_attention_heads='1'"),
        ("widths", [{}, 7], "widths: 7 must be config overrides"),
        ("widths", [{}, None], "widths: None"),
        ("condensed_for", None, "condensed_for=None must be a list"),
        ("condensed_for", ["evil"], "condensed_for: 'evil' must be config overrides"),
        ("condensed_for", [{"evil": "{{ code }}"}], "no config key 'evil'"),
        ("condensed_for", [{"num_layers": 10**7}], "num_layers=10000000 is out of range"),
    ],
)  # fmt: skip
def test_descriptions_that_lie(one, folder, path, value, message):
    description = copy.deepcopy(asdict(one.config))
    name, _, key = path.replace(".", "/", 1).partition("/") if "/" not in path else path.partition("/")
    if key or path.endswith("/"):
        description[name][key] = value
    else:
        description[name] = value
    rewrite(folder, one, description=description)
    start = time.process_time()
    with pytest.raises(LearngeneError, match=message):
        load(folder)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([47], "has the shape"),
        ([10**9], "has the shape"),
        ([2**40], "must be a whole number"),
        ([0], "must be a whole number"),
        ([48.0], "must be a whole number"),
        ([48, 48], "must be .rank"),
        (48, "must be .rank"),
        ("48", "must be .rank"),
    ],
)
def test_descriptions_of_fine_that_lie(tmp_path, size, message):
    fine = learngene("dit", "fine")
    fine.save_pretrained(tmp_path)
    assert_same(fine, load(tmp_path))
    description = copy.deepcopy(asdict(fine.config))
    assert description["bank_sizes"][f"{DIT}.attn1.to_q+to_k+to_v"] == [48]
    description["bank_sizes"][f"{DIT}.attn1.to_q+to_k+to_v"] = size
    rewrite(tmp_path, fine, description=description)
    with pytest.raises(LearngeneError, match=message):
        load(tmp_path)


QKV = f"{DIT}.attn1.to_q+to_k+to_v"


@pytest.fixture(scope="module")
def kind():
    """Classes with one unit, two units, none, and unknown ones; of 3 units, two tailors each."""
    gate = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0], *([[0, 0, 0]] * 6)]
    sizes = {key: [6, 6] for key in Learngene.condense(ancestry("dit").model).config.bank_sizes}
    config = KINDConfig(class_gate=gate, known_classes=[0, 1, 2, 3, 9], group_sizes=sizes)
    made = Learngene.condense(ancestry("dit").model, config)
    assert made.config.class_tailors == [[0], [1, 2], [], [1], *([None] * 5), []]
    return made


def test_round_trip_of_kind(kind, tmp_path):
    kind.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(kind, loaded)
    inputs = ancestry("dit").inputs | {"class_labels": torch.tensor([1, 10])}
    for arguments in ({}, {"classes": [1, 2]}, {"num_new_classes": 2}):
        models = [one.descend(**arguments).eval() for one in (kind, loaded)]
        assert torch.equal(*(model(**inputs).sample for model in models))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["learngene", "kind", "safetensors"] and "5 of 10: 0, 1, 2, 3, 9." in card.text
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LearngeneError, match="download or copy it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_tailors": None}, "class_tailors=None must be a list with an entry for every class"),
        ({"class_tailors": []}, "class_tailors=.. must be a list"),
        ({"class_tailors": {}}, "class_tailors={} must be a list"),
        ({"class_tailors": "abc"}, "class_tailors='abc' must be a list"),
        ({"class_tailors": 10}, "class_tailors=10 must be a list"),
        ({"class_tailors": [[0], [1, 2]]}, "has 2 classes, but the model has labels for 10"),
        ({"class_tailors": [[0]] * 100_000}, "has 100000 classes, but the model has labels for 10"),
        ({3: 1}, r"class_tailors\[3\]=1 must be null, or ascending numbers"),
        ({3: "1"}, r"class_tailors\[3\]='1'"),
        ({3: {"1": 1}}, r"class_tailors\[3\]={'1': 1}"),
        ({3: [True]}, r"class_tailors\[3\]=.True."),
        ({3: [1.0]}, r"class_tailors\[3\]=.1.0."),
        ({3: ["1"]}, r"class_tailors\[3\]=.'1'."),
        ({3: [None]}, r"class_tailors\[3\]=.None."),
        ({3: [-1]}, r"class_tailors\[3\]=.-1."),
        ({3: [1, 1]}, r"class_tailors\[3\]=.1, 1."),
        ({3: [2, 1]}, r"class_tailors\[3\]=.2, 1."),
        ({3: [4]}, "has units up to 4, but some of them belong to no class"),
        ({3: [10**12]}, "has units up to 1000000000000, but some of them belong to no class"),
        ({3: [3]}, "the 6 tailors of .* cannot fall into the 4 units"),
        ({0: None}, "has units up to 2, but some of them belong to no class"),
        ({"class_tailors": [None] * 10}, "the 6 tailors of .* cannot fall into the 0 units"),
        ({QKV: [6, 7]}, "the 7 tailors of .* cannot fall into the 3 units"),
        ({QKV: [6, 3]}, "has the shape"),
        ({QKV: [10**9, 6]}, "has the shape"),
        ({QKV: [2**31, 6]}, "must be a whole number"),
        ({QKV: [6, 2**40]}, "must be a whole number"),
        ({QKV: [2**31 - 1, 6]}, "their number=.* must be a whole number"),
        ({QKV: [0, 0]}, "their number=0 must be a whole number"),
        ({QKV: [-6, 18]}, "must be a whole number"),
        ({QKV: [6.0, 6]}, "must be a whole number"),
        ({QKV: [True, 6]}, "must be a whole number"),
        ({QKV: ["6", 6]}, "must be a whole number"),
        ({QKV: [12]}, r"must be \[learngenes, tailors\]"),
        ({QKV: [6, 3, 3]}, r"must be \[learngenes, tailors\]"),
        ({QKV: 12}, r"must be \[learngenes, tailors\]"),
        ({QKV: None}, r"must be \[learngenes, tailors\]"),
        ({"method": "fine"}, r"must be \[rank\]"),
        ({"method": "wave"}, r"must be \[templates, height, width\]"),
        ({"widths": [{}, {"num_attention_heads": 1}]}, "widths=.* sizes"),
        ({"condensed_for": [{"num_layers": 5}]}, "would change the size, but layers share nothing in KIND"),
        ({"num_embeds_ada_norm": 11}, "class_tailors has 10 classes, but the model has labels for 11"),
        ({"num_embeds_ada_norm": "10"}, "class_tailors has 10 classes, but the model has labels for 10"),
        ({"num_layers": 4}, "has the shape"),
    ],
)  # fmt: skip
def test_descriptions_of_kind_that_lie(kind, tmp_path, change, message):
    description = copy.deepcopy(asdict(kind.config))
    for key, value in change.items():
        places = [description["bank_sizes"], description["base_config"], description]
        place = description["class_tailors"] if type(key) is int else next(p for p in places if key in p)
        place[key] = value
    rewrite(tmp_path, kind, description=description)
    start = time.process_time()
    with pytest.raises(LearngeneError, match=message):
        load(tmp_path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(f"v.{QKV}"), r"lacks the tensors \['v\."),
        (lambda t: t.update({f"u.{QKV}": t[f"u.{QKV}"][:2]}), "'u.*' has the shape .2, 48, 12., but .* .3, 48, 12."),
        (lambda t: t.update({f"u.{QKV}": t[f"u.{QKV}"][0]}), "'u.*' has the shape"),
        (lambda t: t.update({f"u.{QKV}": t[f"u.{QKV}"][..., :6]}), "'u.*' has the shape"),
        (lambda t: t[f"v.{QKV}"].fill_(float("inf")), "'v.*' of .* holds NaN or infinity"),
    ],
)
def test_tensors_of_kind_that_do_not_fit(kind, tmp_path, spoil, message):
    tensors = {key: value.clone() for key, value in kind.tensors.items()}
    spoil(tensors)
    rewrite(tmp_path, kind, tensors=tensors)
    with pytest.raises(LearngeneError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("seed", range(25))
def test_fuzzed_descriptions_of_kind(kind, tmp_path, seed):
    source = random.Random(seed)
    description = copy.deepcopy(asdict(kind.config))
    if seed % 3:
        description["class_tailors"] = mutate(description["class_tailors"], source)
    else:
        description = mutate(description, source)
    rewrite(tmp_path, kind, description=description)
    assert_loads_or_is_refused(tmp_path, kind)


@pytest.mark.parametrize("name", ["architecture", "base_config", "bank_sizes", "widths", "ancestry", "method"])
def test_descriptions_that_lack_something(one, folder, name):
    description = {key: value for key, value in asdict(one.config).items() if key != name}
    rewrite(folder, one, description=description)
    with pytest.raises(LearngeneError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"a"', "[" * 100_000, '{"format_version": 1' + "0" * 5000 + "}"]
)
def test_descriptions_that_are_not_json(one, folder, text):
    rewrite(folder, one, metadata={"learngene": text})
    with pytest.raises(LearngeneError):
        load(folder)


def test_sizes_that_are_only_claimed_take_no_memory(one, folder):
    description = copy.deepcopy(asdict(one.config))
    description["base_config"] |= {"num_attention_heads": 2**20, "sample_size": 256}
    rewrite(folder, one, description=description)
    tracemalloc.start()
    before = torch_memory()
    with pytest.raises(LearngeneError, match="tables would hold"):
        load(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**26 and torch_memory() - before < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_could_not_be_read_is_not_saved(one, folder, value):
    spoilt = one.with_tensors(one.tensors | {BIAS: one.tensors[BIAS] * value})
    with pytest.raises(ValueError, match=re.escape(f"'{BIAS}' holds NaN or infinity")):
        spoilt.save_pretrained(folder)
    assert_same(one, load(folder))


def torch_memory():
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------- fuzz

VALUES = [None, True, -1, 0, 1, 2.5, 10**12, "", "a", "a/b", [], [1], {}, {"a": 1}, [[]], [{}], {"": None}]


def mutate(value, random):
    """A JSON value with one part replaced, dropped or added."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.7:
            return {**value, key: mutate(value[key], random)}
        if kind < 0.8:
            return {k: v for k, v in value.items() if k != key}
        return {**value, random.choice(["_x", "auto_map", "num_layers", "x"]): random.choice(VALUES)}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], mutate(value[at], random), *value[at + random.choice([0, 1]) :]]
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice([-2, -1, 1, 2, 64])
    return random.choice(VALUES)


def assert_loads_or_is_refused(folder, one):
    try:
        loaded = load(folder)
    except LearngeneError as error:
        assert str(error)
    else:  # something that does not matter was changed: it works, and is of the same sizes
        assert {k: t.shape for k, t in loaded.tensors.items()} == {k: t.shape for k, t in one.tensors.items()}
        assert all(tensor.isfinite().all() for tensor in loaded.tensors.values())
        loaded.generate_model_card()


@pytest.mark.parametrize("seed", range(50))
def test_fuzzed_descriptions(one, folder, seed):
    source = random.Random(seed)
    description = mutate(copy.deepcopy(asdict(one.config)), source)
    rewrite(folder, one, description=mutate(description, source) if seed % 3 == 0 else description)
    assert_loads_or_is_refused(folder, one)


@pytest.mark.parametrize("seed", range(50))
def test_fuzzed_bytes(one, folder, seed):
    source = random.Random(seed)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(source.choice([1, 1, 3, 20])):
        content[source.randrange(8 if seed % 10 == 0 else header)] = source.randrange(256)
    if seed % 4 == 0:
        at = source.randrange(header)
        del content[at : at + source.randrange(1, 50)]
    path.write_bytes(content)
    assert_loads_or_is_refused(folder, one)
