# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU against one with twice the accumulation."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_learngene.runs.loop import TrainingOptions, train
from diffusers_learngene.runs.tracking import create_accelerator
from forks import together


class Elastic(nn.Module):
    """A student that leaves a layer out at every other step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs, depth):
        for layer in self.layers[:depth]:
            inputs = inputs + layer(inputs).tanh()
        return inputs


def loss_fn(model, batch, generator, step):
    noise = torch.randn(batch["images"].shape, generator=generator)
    return (model(batch["images"] + noise, 2 + step % 2) - noise).square().mean()


def run(accelerator, output_dir, steps=6, **options):
    draws = torch.Generator().manual_seed(0)
    model, data = Elastic(), [{"images": torch.randn(4, generator=draws)} for _ in range(11)]
    settings = {"train_batch_size": 3, "learning_rate": 1e-2, "ema_decay": 0.9, "checkpointing_steps": 3, **options}
    history = train(
        accelerator,
        model,
        loss_fn,
        data,
        TrainingOptions(steps, lr_scheduler="cosine", **settings),
        output_dir=str(output_dir),
        name="test",
        evaluate=lambda step: {"norm": model.layers[2].weight.norm().item()},
        eval_steps=(0, steps),
    )
    return model, history


def two_processes(folder):
    """What each of them runs: all steps, and then again with the second half resumed."""
    accelerator = create_accelerator("test", output_dir=folder)
    assert accelerator.num_processes == 2
    results = {"whole": run(accelerator, folder / "whole")}
    run(accelerator, folder / "halves")
    if accelerator.is_main_process:
        (folder / "halves" / "checkpoint-6").rename(folder / "halves" / "elsewhere")
    accelerator.wait_for_everyone()
    results["resumed"] = run(accelerator, folder / "halves", resume_from_checkpoint="latest")
    if accelerator.is_main_process:
        for name, (model, history) in results.items():
            save_file(model.state_dict(), folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(history))
    accelerator.end_training()


def test_two_processes_train_as_one(tmp_path):
    together(two_processes, tmp_path)

    weights = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed")}
    assert all(torch.equal(weights["whole"][key], weights["resumed"][key]) for key in weights["whole"])
    history = json.loads((tmp_path / "whole.json").read_text())
    assert history == json.loads((tmp_path / "resumed.json").read_text())
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoint-6").glob("random_states_*")) == [
        "random_states_0.pkl",
        "random_states_1.pkl",
    ]

    alone, expected = run(Accelerator(cpu=True, gradient_accumulation_steps=2), tmp_path / "alone")
    torch.testing.assert_close(weights["whole"], dict(alone.state_dict()), rtol=0, atol=1e-5)
    assert [record["loss"] for record in history[1:]] == pytest.approx([r["loss"] for r in expected[1:]], abs=1e-5)
    # A checkpoint of two processes can be continued by one, with the same shards.
    run(
        Accelerator(cpu=True, gradient_accumulation_steps=2),
        tmp_path / "whole",
        resume_from_checkpoint="checkpoint-3",
    )
