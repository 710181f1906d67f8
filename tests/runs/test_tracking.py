# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_learngene.runs.tracking import JSONLTracker, check_processes, create_accelerator


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_logged_as_json_lines(tmp_path):
    accelerator = create_accelerator(
        "run",
        output_dir=tmp_path / "new",
        config={"seed": 1, "path": tmp_path, "unset": None},
        report_to="tensorboard",
    )
    accelerator.log({"loss": 0.5, "tensor": torch.tensor(2), "array": np.float32(0.25)}, step=3)
    config, values = lines(tmp_path / "new" / "log.jsonl")
    assert config == {"config": {"seed": 1, "path": str(tmp_path)}}
    assert values.pop("time") > 1e9
    assert values == {"step": 3, "loss": 0.5, "tensor": 2, "array": 0.25}
    assert list((tmp_path / "new" / "logs").rglob("events.out.tfevents*"))
    accelerator.end_training()


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        JSONLTracker(tmp_path / "log.jsonl").log({"loss": 1.0}, step=step)
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["wandbb", "wandb"])
def test_an_unknown_or_missing_tracker_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_learngene.runs.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=f"report_to='{name}'.*(is not one of|pip install)"):
        create_accelerator("run", output_dir=tmp_path, report_to=["tensorboard", name])


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2.*ACCELERATE_USE_CPU=true torchrun"):
        check_processes(accelerator)


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU: on a CPU take 'bf16' or 'no'"):
        create_accelerator("test", output_dir=tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()
