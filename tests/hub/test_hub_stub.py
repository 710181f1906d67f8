# SPDX-License-Identifier: Apache-2.0
"""The real Hub clients work against the stand-in that the other tests rely on."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, get_session, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub):
    return HfApi()


def upload(api, folder, content, **kwargs):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "data.bin").write_bytes(bytes(range(256)))
    api.create_repo("me/thing", exist_ok=True)
    return api.upload_folder(repo_id="me/thing", folder_path=folder, **kwargs)


def test_upload_and_download(hub, api, tmp_path):
    assert api.whoami()["name"] == "me"
    commit = upload(api, tmp_path / "a", "{}")
    assert api.model_info("me/thing").sha == commit.oid
    assert set(api.list_repo_files("me/thing")) == {".gitattributes", "config.json", "sub/data.bin"}
    assert hub.files("me/thing")["config.json"] == b"{}"
    assert [entry.path for entry in api.list_repo_tree("me/thing", "sub")] == ["sub/data.bin"]
    folder = Path(snapshot_download("me/thing", allow_patterns=["sub/*"]))
    assert folder.name == commit.oid
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["data.bin"]
    assert (folder / "sub" / "data.bin").read_bytes() == bytes(range(256))


def test_revisions(hub, api, tmp_path):
    first = upload(api, tmp_path / "a", "first").oid
    api.create_tag("me/thing", tag="v1")
    api.create_branch("me/thing", branch="dev")
    upload(api, tmp_path / "a", "second")
    pull_request = upload(api, tmp_path / "a", "third", create_pr=True)
    contents = {"v1": "first", "dev": "first", first: "first", None: "second", pull_request.pr_revision: "third"}
    for revision, content in contents.items():
        assert Path(hf_hub_download("me/thing", "config.json", revision=revision)).read_text() == content
    refs = api.list_repo_refs("me/thing")
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first}
    api.delete_file("config.json", "me/thing")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/thing", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/thing", "config.json", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/nothing", "config.json")


def test_ranges(hub, api, tmp_path):
    upload(api, tmp_path / "a", "0123456789")
    url = hf_hub_url("me/thing", "config.json")
    for span, content in {"2-4": "234", "7-": "789", "8-99": "89"}.items():
        answer = get_session().get(url, headers={"Range": f"bytes={span}"})
        assert (answer.status_code, answer.text) == (206, content)


def test_model_card(hub, api):
    card = ModelCard("---\nlicense: mit\ntags: [learngene]\n---\n# Hello\n")
    api.create_repo("me/card")
    card.push_to_hub("me/card")
    assert ModelCard.load("me/card").data.tags == ["learngene"]


def test_offline_from_the_cache(hub, api, tmp_path):
    upload(api, tmp_path / "a", "cached")
    folder = snapshot_download("me/thing")
    with hub.down():
        assert snapshot_download("me/thing") == folder
        assert Path(hf_hub_download("me/thing", "config.json")).read_text() == "cached"
        with pytest.raises(LocalEntryNotFoundError):
            snapshot_download("me/other")
    assert api.repo_exists("me/thing")


def test_starts_empty(hub):
    assert not hub.repos and not hub.requests
    with hub.down(), pytest.raises(LocalEntryNotFoundError):
        snapshot_download("me/thing")
