# SPDX-License-Identifier: Apache-2.0
"""Runs the example scripts in this process where that will do: importing the libraries takes each new one seconds."""

import importlib.util
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from diffusers_learngene.data import image_classes as data


ROOT = Path(__file__).parents[2]


class Example:
    """An example script, and arguments that make it tiny. Calling it runs it as a new process would."""

    def __init__(self, name, tiny):
        self.path, self.tiny = ROOT / "examples" / name, tiny.split()
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        self.module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:  # as Python does for a script
            patch.syspath_prepend(str(self.path.parent))
            spec.loader.exec_module(self.module)

    def __call__(self, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        return self.module.main(self.module.parse_args([*self.tiny, *map(str, arguments)]))

    def launch(self, launcher, *arguments, **environment):
        """Run it in a new process, by `python -m <launcher>`."""
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), **environment}
        return subprocess.run(
            [sys.executable, *(["-m", *launcher.split()] if launcher else []), self.path, *map(str, arguments)],
            env={key: value for key, value in variables.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=600,
        )


TINY = (
    "--num_layers 2 --num_attention_heads 2 --attention_head_dim 8 --ancestry_train_steps 4 --max_train_steps 4 "
    "--descend_train_steps 4 --scaler_train_steps 2 --num_samples 20 --num_inference_steps 2 --train_batch_size 8 "
    "--lr_warmup_steps 0 --checkpointing_steps 2"
)


TINY_KIND = (
    "--num_layers 2 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 4 --adapt_train_steps 4 "
    "--num_samples 20 --num_inference_steps 2 --train_batch_size 8 --lr_warmup_steps 0 --checkpointing_steps 2"
)


@pytest.fixture(scope="module")
def train_wave():
    return Example("train_wave.py", TINY)


@pytest.fixture(scope="module")
def train_fine():
    return Example("train_fine.py", TINY)


@pytest.fixture(scope="module")
def train_cretok():
    return Example(
        "train_cretok.py",
        "--clip_train_steps 4 --clip_train_batch_size 4 --max_train_steps 4 --eval_steps 2 --checkpointing_steps 2 "
        "--theta 0.999 --num_validation_images 1 --num_inference_steps 1",
    )


@pytest.fixture(scope="module")
def cretok_speed():
    return Example("benchmark/cretok_speed.py", "--width 64 --layers 1 --pairs 4")


@pytest.fixture(scope="module")
def grl_speed():
    return Example("benchmark/grl_speed.py", "--steps 64 --epochs 1 --rounds 1 --num_workers 1")


@pytest.fixture(scope="module")
def gtl_speed():
    return Example("benchmark/gtl_speed.py", "--networks 2 --rounds 1")


@pytest.fixture(scope="module")
def kind_speed():
    return Example("benchmark/kind_speed.py", "--size S --layers 2 --batch_size 2 --rounds 1")


@pytest.fixture(scope="module")
def speed():
    return Example("benchmark/speed.py", "--sections add --rounds 1 --tokens 2")


@pytest.fixture(scope="module")
def cretok_quality():
    return Example("benchmark/cretok_quality.py", "--num_pairs 2 --seeds 1 --num_inference_steps 1 --resolution 16")


@pytest.fixture(scope="module")
def train_kind():
    return Example("train_kind.py", TINY_KIND)


@pytest.fixture(scope="module")
def train_grl():
    return Example(
        "train_grl.py", "--population_size 4 --num_generations 2 --epochs 1 --steps 64 --newborns 1 --num_workers 1"
    )


@pytest.fixture(scope="module")
def train_gtl():
    return Example(
        "train_gtl.py",
        "--num_generations 2 --population_size 4 --networks_per_batch 2 --pool_size 2 --life_steps 3 --critic_steps 2 "
        "--critic_tasks 1 --test_steps 4 --eval_steps 0 2 --test_tasks 2 --images_per_class 12 --num_shots 4 "
        "--validation_shots 4",
    )


def _save_small(figure, save, path, *, dpi, **options):
    save(figure, path, dpi=min(dpi, 72), **options)


@pytest.fixture(scope="module", autouse=True)
def digits():
    """200 digits instead of 1,797, because they are decoded in every run; no search for garbage between models; and
    small pictures, which `tests/runs/test_plots.py` looks at in full."""
    few = data._digits().select(range(200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_digits", lambda: few)
        patch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)
        patch.setattr(Figure, "savefig", partialmethod(_save_small, Figure.savefig))
        yield few


@pytest.fixture(scope="module")
def image_folder(digits, tmp_path_factory):
    """A folder of three folders of twelve gray images each, 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    for label in (0, 1, 2):
        rows = [row for row in digits if row["label"] == label][:12]
        (folder / f"class-{label}").mkdir()
        for index, row in enumerate(rows):
            row["image"].save(folder / f"class-{label}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Pairs of words that the tiny tokenizers know."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    path.write_text("lettuce, mantis\nbee, frog\nowl, unicorn\nsheep, cauliflower\n")
    return path
