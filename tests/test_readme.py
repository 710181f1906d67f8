# SPDX-License-Identifier: Apache-2.0
"""The README's tour is run as it stands; only what it loads from elsewhere is tiny, and lies in this folder."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from ancestries import ancestry
from artefacts import make_circuit, make_gene
from diffusers_learngene import FINEConfig, KINDConfig, Learngene, WAVEConfig, get_scalers
from diffusers_learngene.evolution.grl.policy import ActorCritic
from models import MODELS
from text_to_image import make_cretok, pipeline


TOUR = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


class Pipe:
    """What the tour needs of a pipeline: a transformer that is new in every session, or that has an adapter."""

    def __init__(self, name, adapter=None):
        self.name, self.adapted = name, None if adapter is None else get_peft_model(MODELS[name]().model, adapter)

    @property
    def transformer(self):
        return self.adapted or MODELS[self.name]().model

    def __call__(self, *_):
        return self.transformer(**MODELS[self.name]().inputs)


def one_learngene():
    Learngene.condense(ancestry("dit").model, WAVEConfig()).save_pretrained("outputs/wave/learngene")
    return {}


def adapters():
    return {"pipe": Pipe("dit")}


def tasks():
    model = get_peft_model(MODELS["dit"]().model, FINEConfig())
    return {"model": model, "churches": {name: torch.zeros_like(t) for name, t in get_scalers(model).items()}}


def classes():
    return {"dit": ancestry("dit").model, "pipe": Pipe("pixart", KINDConfig(num_classes=10, class_groups=[[3]]))}


def creative():
    pipeline("sd3").save_pretrained("stabilityai/stable-diffusion-3.5-medium")
    make_cretok("sd3").save_pretrained("me/cretok-sd3")
    return {}


def evolved():
    make_circuit().save_pretrained("me/circuit")
    make_gene().save_pretrained("me/gene")
    return {"ppo": SimpleNamespace(policy=ActorCritic(3, 1))}


PRELUDES = [one_learngene, adapters, tasks, classes, creative, evolved]


def test_the_tour_is_whole():
    assert len(TOUR) == len(PRELUDES) and all(f"# {number}. " in code for number, code in enumerate(TOUR, start=1))


@pytest.mark.parametrize(
    ("code", "prelude"), list(zip(TOUR, PRELUDES, strict=False)), ids=[prelude.__name__ for prelude in PRELUDES]
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_tour(code, prelude, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), prelude())
