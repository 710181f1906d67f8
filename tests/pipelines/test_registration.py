# SPDX-License-Identifier: Apache-2.0
"""`custom_pipeline="cretok"`: in either import order, offline, and without a line of remote code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline

import diffusers_learngene
from diffusers_learngene import CreTokPipeline
from diffusers_learngene.pipelines.cretok import FAMILIES
from text_to_image import FAMILIES as NAMES
from text_to_image import make_cretok, pipeline


each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def no_remote_code(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "1")


@each_name
def test_from_pretrained(bases, name, hub):
    with hub.down():
        for loader in (DiffusionPipeline, AutoPipelineForText2Image):
            pipe = loader.from_pretrained(bases[name], custom_pipeline="cretok")
            assert type(pipe) is FAMILIES[type(pipeline(name)).__name__] and isinstance(pipe, CreTokPipeline)
            pipe.load_cretok(make_cretok(name))


@each_name
def test_from_pipe(name):
    base = pipeline(name)
    for pipe in (DiffusionPipeline.from_pipe(base, custom_pipeline="cretok"), CreTokPipeline.from_pipe(base)):
        assert isinstance(pipe, CreTokPipeline) and pipe.text_encoder is base.text_encoder


def test_download(bases, hub):
    pipeline("sd").push_to_hub("me/sd")
    folder = DiffusionPipeline.download("me/sd", custom_pipeline="cretok")
    assert (Path(folder) / "model_index.json").is_file()
    with hub.down():
        assert isinstance(DiffusionPipeline.from_pretrained("me/sd", custom_pipeline="cretok"), CreTokPipeline)


def test_an_explicit_class_stays_what_it_is(bases):
    assert type(StableDiffusionPipeline.from_pretrained(bases["sd"])) is StableDiffusionPipeline
    assert type(DiffusionPipeline.from_pretrained(bases["sd"])) is StableDiffusionPipeline
    family = FAMILIES["StableDiffusionPipeline"]
    assert type(family.from_pretrained(bases["sd"])) is family


def test_other_bases_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    listed = re.escape(f"is made of one of {list(FAMILIES)}, not of 'DiTPipeline'")
    for call in (DiffusionPipeline.from_pretrained, DiffusionPipeline.download):
        with pytest.raises(ValueError, match=listed):
            call(tmp_path, custom_pipeline="cretok")
    with pytest.raises(ValueError, match=listed):
        CreTokPipeline.from_pretrained(tmp_path)


def test_other_names_go_to_diffusers(bases):
    with pytest.raises(Exception) as caught:
        DiffusionPipeline.from_pretrained(bases["sd"], custom_pipeline="cretok2")
    assert "CreTok" not in type(caught.value).__name__ and "is made of one of" not in str(caught.value)


def test_registering_again_changes_nothing():
    methods = {
        name: DiffusionPipeline.__dict__[name].__func__ for name in ("from_pretrained", "from_pipe", "download")
    }
    diffusers_learngene.register_custom_pipelines()
    for name, method in methods.items():
        assert DiffusionPipeline.__dict__[name].__func__ is method
        assert not hasattr(method.without_learngene, "without_learngene")


@pytest.mark.slow
def test_the_plugin_first_and_at_once(bases):
    """Importing the plugin imports no pipeline of diffusers; importing those afterwards registers."""
    code = f"""
import sys, diffusers_learngene
heavy = {{"diffusers.pipelines.pipeline_utils", "diffusers.models.modeling_utils", "transformers.models.clip"}}
assert not heavy & sys.modules.keys()
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
assert "__init_subclass__" not in vars(ConfigMixin)
print(type(DiffusionPipeline.from_pretrained({str(bases["sd"])!r}, custom_pipeline="cretok")).__qualname__)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "CreTokStableDiffusionPipeline", done.stderr[-3000:]
