# SPDX-License-Identifier: Apache-2.0
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from diffusers_learngene.runs.checkpoints import digest
from diffusers_learngene.runs.loop import TrainingOptions, train


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


def run(
    output_dir,
    model,
    *,
    steps=7,
    accumulation=1,
    mixed_precision="no",
    data=None,
    groups=None,
    evaluate=None,
    eval_steps=(),
    signature=None,
    **options,
):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    options = {"train_batch_size": 4, "learning_rate": 1e-2, **options}
    return train(
        accelerator,
        model,
        loss_fn,
        data or dataset(),
        TrainingOptions(steps, **options),
        output_dir=str(output_dir),
        name="test",
        param_groups=groups,
        evaluate=evaluate,
        eval_steps=eval_steps,
        signature=signature,
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
    resumed = network()
    torch.manual_seed(99)
    history = run(
        tmp_path / "halves", resumed, evaluate=evaluate_with(resumed), resume_from_checkpoint="latest", **options
    )
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for step in (6, 7):
        assert_same_checkpoint(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "halves" / f"checkpoint-{step}")


@pytest.mark.parametrize("lr_scheduler", ["constant", "constant_with_warmup"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_constant_schedule_goes_on_for_longer(tmp_path, lr_scheduler, ema_decay):
    options = {"lr_scheduler": lr_scheduler, "lr_warmup_steps": 2, "ema_decay": ema_decay, "checkpointing_steps": 3}
    options["evaluate"] = lambda step: {"step_again": step}
    whole, parts = network(), network()
    expected = run(tmp_path / "whole", whole, eval_steps=(0, 4, 7), **options)
    run(tmp_path / "parts", parts, steps=5, eval_steps=(0, 1, 4, 5), **options)
    parts = network()
    history = run(tmp_path / "parts", parts, eval_steps=(0, 4, 7), resume_from_checkpoint="latest", **options)
    assert history == expected  # what only the shorter one evaluated is not there
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def changed_sample(key, value):
    data = dataset()
    data[11] = {**data[11], key: value}
    return data


def tensors_of(data):
    return [{**item, "images": item["images"].double()} for item in data]


def another_buffer(model):
    model[2].register_buffer("mask", torch.ones(2), persistent=False)
    return model


def groups_of(model, **options):
    return [{"params": model[0].parameters(), **options}, {"params": model[3].parameters()}]


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"lr_scheduler": "linear"},
            r"lr_scheduler='linear' \(there 'constant'\), .*max_train_steps=7 \(there None\)",
        ),
        ({"lr_scheduler": "constant_with_warmup"}, r"lr_warmup_steps=0 \(there None\)"),
        ({"learning_rate": 2e-2}, r"learning_rate=\[0.02\] \(there \[0.01\]\)"),
        ({"groups": {}}, r"group_sizes=\[2, 2\] \(there \[4\]\)"),
        ({"groups": {"lr": 1e-3}}, r"learning_rate=\[0.001, 0.01\] \(there \[0.01\]\)"),
        ({"groups": {"weight_decay": 1e-3}}, r"'weight_decay': 0.001"),
        ({"max_grad_norm": 2.0}, r"max_grad_norm=2.0 \(there 1.0\)"),
        ({"ema_decay": 0.5}, r"ema_decay=0.5 \(there None\)"),
        ({"seed": 1}, r"seed=1 \(there 0\)"),
        ({"mixed_precision": "bf16"}, r"mixed_precision='bf16' \(there 'no'\)"),
        ({"accumulation": 2}, r"total_batch_size=8 \(there 4\), shards=2 \(there 1\)"),
        ({"train_batch_size": 2, "accumulation": 2}, r"than shards=2 \(there 1\):"),
        ({"model": network(seed=1)}, r"than starting_weights='\w+' \(there '\w+'\):"),
        ({"model": another_buffer(network())}, r"than starting_weights="),
        ({"data": dataset(21)}, r"data.samples=21 \(there 22\)"),
        ({"data": changed_sample("labels", 7)}, r"than data.digest='\w+' \(there '\w+'\):"),
        ({"data": changed_sample("images", torch.zeros(6))}, r"than data.digest="),
        ({"data": tensors_of(dataset())}, r"than data.digest="),
        ({"data": [{**item, "more": torch.zeros(2, 3)} for item in dataset()]}, r"data.shapes.more=\[2, 3\]"),
        ({"signature": {"loss": {"noise_weight": 0.5}}}, r"than loss.noise_weight=0.5 \(there 1.0\):"),
        ({"signature": {}}, r"than loss.noise_weight=None \(there 1.0\):"),
        ({"steps": 2}, r"checkpoint-3' lies beyond max_train_steps=2: give at least 3, or start anew"),
        ({"evaluate": len, "eval_steps": (2, 7)}, r"evaluated after the steps \[\] and not after \[2\]"),
    ],
)
def test_another_training_is_not_gone_on_with(tmp_path, change, named):
    signature = {"loss": {"noise_weight": 1.0}}
    run(tmp_path, network(), steps=3, checkpointing_steps=3, signature=signature)
    before = (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
    AcceleratorState._reset_state()  # of the precision
    model = change.get("model", network())
    change = {key: value for key, value in change.items() if key != "model"}
    if "groups" in change:
        change = {"groups": groups_of(model, **change["groups"])}
    with pytest.raises(ValueError, match=named):
        run(tmp_path, model, resume_from_checkpoint="latest", **{"signature": signature, **change})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"checkpointing_steps": 2},
        {"checkpoints_total_limit": 1},
        {"dataloader_num_workers": 1},
        {"lr_warmup_steps": 3},  # of no meaning to this schedule
        {"signature": {"sizes": ({"num_layers": 2}, (1, 2))}},
    ],
)
def test_what_changes_no_number_may_change(tmp_path, change):
    signature = {"signature": {"sizes": [{"num_layers": 2}, [1, 2]]}}
    run(tmp_path, network(), steps=3, checkpointing_steps=3, **signature)
    run(tmp_path, network(), resume_from_checkpoint="latest", **{**signature, **change})


def test_a_digest_sees_names_dtypes_shapes_and_bytes_and_no_order():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3), "d": "text"}
    expected = digest(tensors.items())
    assert digest(reversed(tensors.items())) == expected and re.fullmatch("[0-9a-f]{16}", expected)
    assert digest({**tensors, "a": torch.arange(12.0)[:6].clone(), "c": np.array(3)}.items()) == expected
    assert digest({**tensors, "a": torch.arange(6.0).view(3, 2).T.contiguous().T.reshape(6)}.items()) == expected
    others = [
        {"a": torch.arange(6.0).view(2, 3)},
        {"a": torch.arange(6.0).view(2, 3).T},
        {"a": torch.arange(6.0).nextafter(torch.tensor(9.0))},
        {"a": torch.arange(6)},
        {"b": torch.ones(2, dtype=torch.half)},
        {"c": torch.tensor([3])},
        {"d": "texts"},
        {"e": torch.empty(0)},
    ]
    found = {digest({**tensors, **other}.items()) for other in others}
    assert len(found | {expected, digest(list(tensors.items())[1:])}) == len(others) + 2


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
