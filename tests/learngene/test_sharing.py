# SPDX-License-Identifier: Apache-2.0
"""A learngene on the Hub: pushed, tagged, fetched, and found again without a network."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from ancestries import ancestry, learngene
from diffusers_learngene import KINDConfig, Learngene, LearngeneError


FILES = {"model.safetensors", "config.json", "README.md"}


def changed(one, shift):
    """The same learngene with other numbers."""
    return Learngene(one.config, {key: tensor + shift for key, tensor in one.tensors.items()})


def assert_same(first, second):
    assert first.config == second.config and first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(second.tensors[key], tensor) for key, tensor in first.tensors.items())


def test_push_and_fetch(hub):
    one = learngene("dit")
    url = one.push_to_hub("me/wave-dit")
    assert "me/wave-dit" in url
    assert set(hub.files("me/wave-dit")) - {".gitattributes"} == FILES
    assert_same(one, Learngene.from_pretrained("me/wave-dit"))
    card = ModelCard(hub.files("me/wave-dit")["README.md"].decode())
    assert 'Learngene.from_pretrained("me/wave-dit"' in card.text and "# wave-dit\n" in card.text


def test_push_and_fetch_kind(hub):
    """With classes that a descendant was taught."""
    one = Learngene.condense(ancestry("dit").model, KINDConfig(num_learngene=4, tailors_per_class=1))
    wider = one.absorb(one.descend(classes=[2, 5], num_new_classes=1))
    wider.push_to_hub("me/kind-dit")
    assert set(hub.files("me/kind-dit")) - {".gitattributes"} == FILES
    loaded = Learngene.from_pretrained("me/kind-dit")
    assert_same(wider, loaded)
    text = ModelCard(hub.files("me/kind-dit")["README.md"].decode()).text
    assert "3 of 11: 2, 5, 10." in text and "descend(classes=[2, 5])" in text and "num_layers=6" not in text


def test_revisions(hub):
    one = learngene("vit")
    one.push_to_hub("me/wave-vit")
    HfApi().create_tag("me/wave-vit", tag="v1")
    changed(one, 1).push_to_hub("me/wave-vit", commit_message="others")
    assert_same(one, Learngene.from_pretrained("me/wave-vit", revision="v1"))
    assert_same(changed(one, 1), Learngene.from_pretrained("me/wave-vit"))


def test_offline(hub):
    one = learngene("vit")
    one.push_to_hub("me/wave-vit")
    HfApi().create_tag("me/wave-vit", tag="v1")
    Learngene.from_pretrained("me/wave-vit", revision="v1")
    Learngene.from_pretrained("me/wave-vit")
    with hub.down():
        assert_same(one, Learngene.from_pretrained("me/wave-vit"))
        assert_same(one, Learngene.from_pretrained("me/wave-vit", revision="v1"))
        with pytest.raises(LocalEntryNotFoundError):
            Learngene.from_pretrained("me/never-seen")
    assert_same(one, Learngene.from_pretrained("me/wave-vit", local_files_only=True))


def test_only_what_belongs_to_the_artefact_is_uploaded(hub, tmp_path, monkeypatch):
    one = changed(learngene("vit"), 0)
    (tmp_path / "samples.png").write_bytes(b"\x89PNG")
    one.card = {"images": [tmp_path / "samples.png"]}
    write = Learngene.save_pretrained

    def save_with_secrets(self, folder, **kwargs):
        write(self, folder, **kwargs)
        for name in ("token.txt", "optimizer.bin", "random_states_0.pkl", ".env", "model.safetensors.bak", "run.py"):
            (folder / name).write_text("secret")
        (folder / "logs").mkdir()
        (folder / "logs" / "events").write_text("secret")

    monkeypatch.setattr(Learngene, "save_pretrained", save_with_secrets)
    one.push_to_hub("me/wave-vit", allow_patterns=["*"])
    assert set(hub.files("me/wave-vit")) - {".gitattributes"} == {*FILES, "samples.png"}


def test_a_private_path_stays_private(hub, tmp_path):
    ancestry("vit").model.save_pretrained(tmp_path / "secret")
    model = type(ancestry("vit").model).from_pretrained(tmp_path / "secret")
    Learngene.condense(model, ancestry=str(tmp_path / "secret")).push_to_hub("me/wave-vit")
    for content in hub.files("me/wave-vit").values():
        assert b"secret" not in content and str(tmp_path).encode() not in content
    assert ModelCard(hub.files("me/wave-vit")["README.md"].decode()).data.base_model is None


def test_save_and_push_at_once(hub, tmp_path):
    url = learngene("vit").save_pretrained(tmp_path / "wave-vit", push_to_hub=True, repo_id="me/other", private=True)
    assert "me/other" in url and set(hub.files("me/other")) - {".gitattributes"} == FILES
    assert learngene("vit").save_pretrained(tmp_path / "wave-vit") is None
    assert_same(learngene("vit"), Learngene.from_pretrained(tmp_path / "wave-vit"))


def test_repositories_that_are_no_learngenes(hub, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        Learngene.from_pretrained("me/nothing")
    HfApi().create_repo("me/pickles")
    for name in ("pytorch_model.bin", "model.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        HfApi().upload_file(path_or_fileobj=tmp_path / name, path_in_repo=name, repo_id="me/pickles")
    before = len(hub.requests)
    with pytest.raises(LearngeneError, match="'me/pickles' holds no model.safetensors"):
        Learngene.from_pretrained("me/pickles")
    assert not [path for _, path in hub.requests[before:] if path.endswith(".bin")]  # nor were they fetched
    with pytest.raises((EntryNotFoundError, OSError)):
        Learngene.from_pretrained("me/pickles", revision="v9")


def test_a_stock_models_weights_are_no_learngene(hub):
    ancestry("vit").model.push_to_hub("me/vit")
    with pytest.raises(LearngeneError, match="without the description of a learngene"):
        Learngene.from_pretrained("me/vit")
