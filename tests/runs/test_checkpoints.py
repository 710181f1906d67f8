# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_learngene.runs import checkpoints
from diffusers_learngene.runs.checkpoints import list_checkpoints, resolve_checkpoint, save_checkpoint
from diffusers_learngene.runs.loop import TrainingOptions, train
from forks import forked


def run(output_dir, accelerator=None, steps=6, **options):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 3), [{"images": torch.full((3,), i / 9)} for i in range(9)]
    options = TrainingOptions(steps, train_batch_size=2, **{"checkpointing_steps": 2, "ema_decay": 0.9, **options})
    train(
        accelerator or Accelerator(cpu=True),
        model,
        lambda model, batch, generator, step: (
            (model(batch["images"]) - torch.rand(3, generator=generator)).square().mean()
        ),
        data,
        options,
        output_dir=str(output_dir),
        name="test",
    )
    return model


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def killed_while_saving(_, output_dir):
    """Train until the second checkpoint is half written."""
    accelerator = Accelerator(cpu=True)

    def kill(models, weights, folder):
        if folder.endswith("checkpoint-4"):
            Path(folder, "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    accelerator.register_save_state_pre_hook(kill)
    run(output_dir, accelerator)


def test_a_kill_while_saving_leaves_the_last_good_checkpoint(tmp_path):
    child, _ = forked(killed_while_saving, tmp_path / "killed")
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert names(tmp_path / "killed") == ["checkpoint-2", "tmp-checkpoint-4"]

    resumed = run(tmp_path / "killed", resume_from_checkpoint="latest")
    expected = run(tmp_path / "whole")
    assert torch.equal(resumed.weight, expected.weight)
    assert names(tmp_path / "killed") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("file", ["trainer_state.json", "ema.safetensors", "optimizer.bin"])
def test_a_full_disk_costs_no_older_checkpoint(tmp_path, monkeypatch, file):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(tmp_path / "full", steps=4, checkpoints_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if file == "trainer_state.json":
            patch.setattr(Path, "write_text", full)
        elif file == "ema.safetensors":
            patch.setattr(checkpoints, "save_file", full)
        else:
            patch.setattr(Accelerator, "save_state", full)
        run(tmp_path / "full", checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert names(tmp_path / "full") == ["checkpoint-4", "tmp-checkpoint-6"]
    resumed = run(tmp_path / "full", checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert torch.equal(resumed.weight, run(tmp_path / "whole").weight)
    assert names(tmp_path / "full") == ["checkpoint-6"]


def test_the_oldest_go_when_the_newest_is_in_place(tmp_path):
    run(tmp_path, checkpoints_total_limit=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_the_one_just_written_is_never_deleted(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, {"step": 3}, total_limit=1)
    assert names(tmp_path) == ["checkpoint-3"]
    accelerator.free_memory()


def test_which_checkpoint_is_meant(tmp_path):
    assert resolve_checkpoint(tmp_path, None) is resolve_checkpoint(tmp_path, "latest") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-old", "tmp-checkpoint-12"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert resolve_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert resolve_checkpoint("elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(ValueError, match=r"'checkpoint-11' is not a folder.*\['checkpoint-9', 'checkpoint-10'\]"):
        resolve_checkpoint(tmp_path, "checkpoint-11")
    with pytest.raises(ValueError, match="already holds checkpoint-10.*'latest' continues it"):
        resolve_checkpoint(tmp_path, None)


def test_resuming_when_all_is_done_changes_nothing(tmp_path):
    done = run(tmp_path)
    assert torch.equal(run(tmp_path, resume_from_checkpoint="latest").weight, done.weight)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "ema.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage):
    run(tmp_path, steps=4)
    path = tmp_path / "checkpoint-4" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-4' cannot be read .*Resume from one of \['checkpoint-2'\]"):
        run(tmp_path, resume_from_checkpoint="latest")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"cannot be read .*Start anew in another output_dir"):
        run(tmp_path, resume_from_checkpoint="latest")


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"seed=1 \(there 0\), ema_decay=None \(there 0\.9\)"):
        run(tmp_path, resume_from_checkpoint="latest", seed=1, ema_decay=None)


def test_the_state_is_plain_json(tmp_path):
    run(tmp_path, steps=2, lr_scheduler="cosine_with_restarts")
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["step"] == 2 and [record["step"] for record in state["history"]] == [1, 2]
