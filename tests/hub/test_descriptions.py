# SPDX-License-Identifier: Apache-2.0
"""What all kinds of artefacts share of their files; what each asks of its description is tested with it."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file

from diffusers_learngene.hub.descriptions import (
    check_settings,
    described_file,
    exact_fields,
    read_tensors,
    write_described,
)


@dataclass
class Config:
    shapes: dict = field(default_factory=lambda: {"a": (2, 3)})


class DamagedError(ValueError):
    pass


def read(path):
    with described_file(path, "thing", "a thing", DamagedError) as (values, file):
        return read_tensors(file, exact_fields(Config, values)["shapes"])


def test_what_is_written_is_read(tmp_path):
    tensors = {"a": torch.randn(2, 3)}
    write_described(tmp_path / "thing", tensors, "thing", Config())
    assert torch.equal(read(tmp_path / "thing")["a"], tensors["a"])


@pytest.mark.parametrize(
    "metadata, tensor, message",
    [
        (None, torch.ones(2, 3), "without the description of a thing"),
        ({"thing": "{"}, torch.ones(2, 3), "is not a thing that can be used"),
        ({"thing": "[" * 100_000}, torch.ones(2, 3), "is not a thing that can be used"),
        ({"thing": "{}"}, torch.ones(2, 3), "of a Config lacks {'shapes'}"),
        ({"thing": '{"shapes": {"a": [2, 3]}}'}, torch.ones(3, 2), "it holds"),
        ({"thing": '{"shapes": {"a": 1}}'}, torch.ones(2, 3), "is not a thing that can be used"),
        ({"thing": '{"shapes": {"a": [2, 3]}}'}, torch.ones(2, 3, dtype=torch.int8), "a is torch.int8"),
    ],
)
def test_whatever_is_wrong_is_the_kinds_own_error(tmp_path, metadata, tensor, message):
    save_file({"a": tensor}, tmp_path / "thing", metadata=metadata)
    with pytest.raises(DamagedError, match=message) as caught:
        read(tmp_path / "thing")
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_file(tmp_path):
    (tmp_path / "thing").write_bytes(b"cut")
    for name in ("thing", "nothing"):
        with pytest.raises(DamagedError, match="cannot be read as safetensors"):
            read(tmp_path / name)


def test_settings():
    check_settings("training", {"a": 1, "b": ["x", 2.5, None]})
    for settings in ([1], {"a": [{}]}, {"a": float("nan")}):
        with pytest.raises(ValueError, match=r"training(\['a'\])?="):
            check_settings("training", settings)
