# SPDX-License-Identifier: Apache-2.0
"""The rows of the matrix: every law below is tried on every method. A new method joins by adding rows to `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from peft import PeftConfig

from diffusers_learngene import FINEConfig, KINDConfig, WAVEConfig
from models import CLASS, MODELS, Tiny


@dataclass
class Method:
    """A kind of adapter; `method(...)` is a new config of it."""

    config_cls: Callable[..., PeftConfig]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **overrides: Any) -> PeftConfig:
        return self.config_cls(**{**self.arguments, **overrides})


# KIND without classes, and with tailors of the one class that `models.run` calls every model with. (What depends on a
# gate of several classes is in `test_gate.py`.)
LEARNGENES = partial(KINDConfig, num_classes=0)
TAILORED = partial(KINDConfig, num_classes=10, class_groups=[[CLASS]])

# Random scalers everywhere, so that nothing passes because it is zero; `test_identity` asks for the true start itself.
METHODS: dict[str, Method] = {
    "wave": Method(WAVEConfig, {"init_weights": False}),
    "wave-odd": Method(WAVEConfig, {"init_weights": False, "num_templates": 5, "template_size": (3, 5)}),
    "wave-apart": Method(WAVEConfig, {"init_weights": False, "share_qkv": False, "template_size": 4}),
    "wave-generate": Method(WAVEConfig, {"mode": "generate"}),
    "wave-generate-odd": Method(WAVEConfig, {"mode": "generate", "num_templates": 6, "template_size": (5, 3)}),
    "fine": Method(FINEConfig, {"init_weights": False}),
    "fine-odd": Method(FINEConfig, {"init_weights": False, "r": 5}),
    "fine-apart": Method(FINEConfig, {"init_weights": False, "share_qkv": False, "r": 4}),
    "fine-generate": Method(FINEConfig, {"mode": "generate"}),
    "fine-generate-wide": Method(FINEConfig, {"mode": "generate", "r": 40}),
    "kind": Method(LEARNGENES, {"init_weights": False}),
    "kind-tailored": Method(TAILORED, {"init_weights": False, "num_learngene": 3, "tailors_per_class": 4}),
    "kind-apart": Method(TAILORED, {"init_weights": False, "share_qkv": False, "num_learngene": 0}),
    "kind-generate": Method(LEARNGENES, {"mode": "generate"}),
    "kind-generate-tailored": Method(TAILORED, {"mode": "generate", "tailors_per_class": 5}),
}
ADDERS = [name for name, method in METHODS.items() if method.arguments.get("mode") != "generate"]
GENERATORS = [name for name in METHODS if name not in ADDERS]


# Every model with one added and one generated adapter of each kind, and every kind on three models: a diffuser,
# transposed weights, convolutions.
PAIRS = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if model in ("dit", "gpt2", "conv2d")
    or method in ("wave-odd", "wave-generate-odd", "fine-odd", "fine-generate-wide")
    or method in ("kind-tailored", "kind-generate-tailored")
]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Callable[..., Tiny], Method]:
    """Architectures and kinds of adapters together."""
    return MODELS[request.param[0]], METHODS[request.param[1]]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Each kind of adapter."""
    return METHODS[request.param]


@pytest.fixture(params=ADDERS)
def adder(request: pytest.FixtureRequest) -> Method:
    """Each kind of adapter that is added to a weight."""
    return METHODS[request.param]


@pytest.fixture(params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> Method:
    """Each kind of adapter that replaces a weight."""
    return METHODS[request.param]


@pytest.fixture(params=[True, False], ids=["factored", "built"])
def factored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to compute a product, whichever is cheaper."""
    for kind in ("wave", "fine"):
        monkeypatch.setattr(f"diffusers_learngene.functional.{kind}.apply_is_cheaper", lambda *_: request.param)
    return request.param
