# SPDX-License-Identifier: Apache-2.0
"""Our names in PEFT's tables, and what importing the package costs."""

import subprocess
import sys

import peft
import pytest
from peft import mapping

import diffusers_learngene
from diffusers_learngene import FINEConfig, FINEModel, KINDConfig, KINDModel, WAVEConfig, WAVEModel
from diffusers_learngene.integrations import LearngenePeftType, register_peft_methods


METHODS = {
    "LEARNGENE_WAVE": (WAVEConfig, WAVEModel),
    "LEARNGENE_FINE": (FINEConfig, FINEModel),
    "LEARNGENE_KIND": (KINDConfig, KINDModel),
}
TABLES = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")


@pytest.mark.parametrize("name", METHODS)
def test_registered(name):
    register_peft_methods()
    for table, entry in zip(TABLES, (*METHODS[name], f"{name.lower()}_"), strict=True):
        entries = getattr(mapping, table)
        assert entries[name] == entries[LearngenePeftType[name]] == entry
    assert LearngenePeftType[name] == name == LearngenePeftType[name].value
    assert peft.get_peft_config({"peft_type": name}) == METHODS[name][0]()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("table", TABLES)
def test_a_taken_name_is_an_error(table, name, monkeypatch):
    monkeypatch.setitem(getattr(mapping, table), name, "theirs")
    before = {name: dict(getattr(mapping, name)) for name in TABLES}
    with pytest.raises(KeyError, match=f"{name} is already registered as 'theirs'"):
        register_peft_methods()
    assert before == {name: dict(getattr(mapping, name)) for name in TABLES}


def test_public_names():
    assert diffusers_learngene.__all__ == sorted(diffusers_learngene.__all__)
    assert all(hasattr(diffusers_learngene, name) for name in diffusers_learngene.__all__)


CODE = """
import sys, time
import peft
start = time.process_time()
import diffusers_learngene
print(time.process_time() - start, *sys.modules)
"""


@pytest.mark.slow
def test_import_is_light():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 0.6  # nearly all of it is diffusers' __init__, without its pipelines and models
    assert not {"matplotlib", "sklearn", "datasets", "gymnasium", "evaluate"} & set(out[1:])
    assert "diffusers.pipelines.pipeline_utils" not in out
