# SPDX-License-Identifier: Apache-2.0
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from diffusers_learngene.training.loop import TrainingOptions, train


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate remembers precision and processes in globals."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def dataset(length=22):
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(length, 6, generator=draws)
    return [{"images": x, "labels": int(x[0] > 0)} for x in inputs]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 6))


def loss_fn(model, batch, generator, step):
    """Denoising in miniature; dropout draws from the global generator, too."""
    noise = torch.randn(batch["images"].shape, generator=generator)
    return F.mse_loss(model(batch["images"] + noise), noise)


def run(output_dir, model, *, steps=7, accumulation=1, evaluate=None, eval_steps=(), mixed_precision="no", **options):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    options = {"train_batch_size": 4, "learning_rate": 1e-2, **options}
    return train(
        accelerator,
        model,
        loss_fn,
        dataset(),
        TrainingOptions(steps, **options),
        output_dir=str(output_dir),
        name="test",
        evaluate=evaluate,
        eval_steps=eval_steps,
    )


def assert_same_checkpoint(one: Path, other: Path):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in ("model.safetensors", "trainer_state.json", "ema.safetensors"):
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    optimizers = [torch.load(folder / "optimizer.bin", weights_only=True) for folder in (one, other)]
    torch.testing.assert_close(*optimizers, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resuming_is_exact(tmp_path, accumulation, ema_decay):
    options = {
        "accumulation": accumulation,
        "ema_decay": ema_decay,
        "checkpointing_steps": 3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "eval_steps": (0, 2, 3, 6, 7),
    }

    def evaluate_with(model):
        return lambda step: {"norm": sum(p.norm().item() for p in model.parameters())}

    whole, halves = network(), network()
    expected = run(tmp_path / "whole", whole, evaluate=evaluate_with(whole), **options)
    run(tmp_path / "halves", halves, evaluate=evaluate_with(halves), **options)
    for step in (6, 7):
        shutil.rmtree(tmp_path / "halves" / f"checkpoint-{step}")
    resumed = network(seed=1)
    torch.manual_seed(99)
    history = run(
        tmp_path / "halves", resumed, evaluate=evaluate_with(resumed), resume_from_checkpoint="latest", **options
    )
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for step in (6, 7):
        assert_same_checkpoint(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "halves" / f"checkpoint-{step}")


def test_history_and_evaluation(tmp_path):
    model, calls = network(), []

    def evaluate(step):
        assert not model.training
        calls.append(step)
        return {"val_loss": torch.tensor(step / 2)}

    history = run(tmp_path, model, steps=4, evaluate=evaluate, eval_steps=[0, 3, 4], lr_scheduler="linear")
    assert calls == [0, 3, 4] and not model.training
    assert [record["step"] for record in history] == [0, 1, 2, 3, 4]
    assert history[0] == {"step": 0, "val_loss": 0.0} and history[3]["val_loss"] == 1.5
    assert "val_loss" not in history[1] and type(history[4]["val_loss"]) is float
    assert [record["lr"] for record in history[1:]] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_the_moving_average_is_evaluated_and_returned(tmp_path):
    model, seen = network(), {}

    def evaluate(step):
        seen[step] = [p.detach().clone() for p in model.parameters()]
        return {}

    run(tmp_path, model, steps=3, ema_decay=0.5, checkpointing_steps=3, evaluate=evaluate, eval_steps=(3,))
    average = load_file(tmp_path / "checkpoint-3" / "ema.safetensors")
    raw = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for (name, parameter), evaluated in zip(model.named_parameters(), seen[3], strict=True):
        assert torch.equal(parameter, average[name]) and torch.equal(evaluated, average[name])
        assert not torch.equal(parameter, raw[name])


def test_only_what_requires_a_gradient_is_trained(tmp_path):
    model, untouched = network(), network()
    model[0].requires_grad_(False)
    run(tmp_path, model, steps=2, checkpointing_steps=2)
    assert torch.equal(model[0].weight, untouched[0].weight) and not torch.equal(model[3].weight, untouched[3].weight)
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.bin", weights_only=True)
    assert len(optimizer["state"]) == 2
    with pytest.raises(ValueError, match="nothing to train"):
        run(tmp_path / "frozen", model.requires_grad_(False))


def test_parameter_groups_keep_their_own_settings(tmp_path):
    model, accelerator = network(), Accelerator(cpu=True)
    before = model[0].weight.clone()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}]
    options = TrainingOptions(2, train_batch_size=4, learning_rate=1e-2)
    train(accelerator, model, loss_fn, dataset(), options, output_dir=str(tmp_path), name="test", param_groups=groups)
    assert torch.equal(model[0].weight, before)
    groups = [{"params": model[3].parameters()}]
    with pytest.raises(ValueError, match=r"leaves out \['0.weight', '0.bias'\]"):
        train(
            accelerator, model, loss_fn, dataset(), options, output_dir=str(tmp_path), name="test", param_groups=groups
        )


def test_one_accelerator_trains_one_model_after_the_other(tmp_path):
    accelerator, results = Accelerator(cpu=True), []
    options = TrainingOptions(2, train_batch_size=4, checkpointing_steps=2)
    for name in ("first", "second"):
        torch.manual_seed(5)
        arguments = {"output_dir": str(tmp_path / name), "name": name}
        results.append(train(accelerator, network(), loss_fn, dataset(), options, **arguments))
    assert results[0] == results[1]
    assert_same_checkpoint(tmp_path / "first" / "checkpoint-2", tmp_path / "second" / "checkpoint-2")


def test_mixed_precision_is_gone_afterwards(tmp_path):
    model, forward = network(), nn.Sequential.forward
    dtypes = set()
    model[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    run(tmp_path, model, mixed_precision="bf16")
    assert dtypes == {torch.bfloat16} and model.forward.__func__ is forward


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path):
    model = network()

    def explode(model, batch, generator, step):
        return loss_fn(model, batch, generator, step) * (math.nan if step == 2 else 1)

    with pytest.raises(ValueError, match="'test' is nan at step 3.*learning rate"):
        train(
            Accelerator(cpu=True), model, explode, dataset(), TrainingOptions(5), output_dir=str(tmp_path), name="test"
        )
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_loss_gets_a_generator_of_its_own_for_each_shard(tmp_path):
    def draws(**options):
        seen = []

        def record(model, batch, generator, step):
            seen.append((step, torch.rand(1, generator=generator).item()))
            return loss_fn(model, batch, generator, step)

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        options = TrainingOptions(3, train_batch_size=4, **options)
        train(accelerator, network(), record, dataset(), options, output_dir=str(tmp_path), name="test")
        return seen

    seen = draws()
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2] and len({value for _, value in seen}) == 6
    assert draws() == seen and draws(seed=1) != seen
    assert draws(dataloader_num_workers=1) == seen


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_train_steps": 0},
        {"train_batch_size": 0},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"checkpoints_total_limit": 0},
        {"checkpointing_steps": 0},
    ],
)
def test_options_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TrainingOptions(**{"max_train_steps": 1, **wrong})
