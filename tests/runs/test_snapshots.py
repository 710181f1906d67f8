# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from diffusers_learngene.runs.checkpoints import list_checkpoints, resolve_checkpoint
from diffusers_learngene.runs.snapshots import load_snapshot, save_snapshot
from forks import forked


SIGNATURE = {"seed": 0, "sizes": (1, 2)}


def save(folder, generation, **options):
    tensors = {"a": torch.arange(4.0) + generation, "b": torch.ones(3, 2).T}
    return save_snapshot(folder, generation, tensors, {"signature": SIGNATURE, "pool": [generation]}, **options)


def test_what_was_saved_is_loaded_and_old_ones_go(tmp_path):
    for generation in range(1, 5):
        save(tmp_path, generation, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    tensors, state = load_snapshot(resolve_checkpoint(tmp_path, "latest"), SIGNATURE)
    assert torch.equal(tensors["a"], torch.arange(4.0) + 4) and tensors["b"].shape == (2, 3)
    assert state["pool"] == [4]


def test_a_snapshot_of_other_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"seed=1 \(there 0\)"):
        load_snapshot(save(tmp_path, 1), SIGNATURE | {"seed": 1})


@pytest.mark.parametrize("file", ["population.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_snapshot_is_named(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2, total_limit=None) / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=r"checkpoint-2' cannot be read .*Resume from one of \['checkpoint-1'\]"):
        load_snapshot(path.parent, SIGNATURE)


def save_for_ever(connection, folder):
    for generation in itertools.count(1):
        tensors = {"a": torch.full((200_000,), float(generation))}
        save_snapshot(folder, generation, tensors, {"signature": {}, "generation": generation})
        connection.send(generation)


@pytest.mark.parametrize("delay", [0.002, 0.009])
def test_killed_at_any_moment_the_last_whole_one_is_left(tmp_path, delay):
    process, connection = forked(save_for_ever, tmp_path)
    for _ in range(3):
        reported = connection.recv()
    process.join(delay)
    process.kill()
    process.join()
    tensors, state = load_snapshot(resolve_checkpoint(tmp_path, "latest"), {})
    assert state["generation"] >= reported and torch.all(tensors["a"] == state["generation"])
