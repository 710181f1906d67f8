# SPDX-License-Identifier: Apache-2.0
"""What a descendant trains is what its adapter's file holds: saved, loaded, and in HF Trainer's checkpoints."""

import contextlib
import io
import itertools

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    CvtConfig,
    CvtForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from ancestries import ARCHITECTURES, ancestry, depth, learngene, lossless
from diffusers_learngene import KINDConfig, Learngene, class_gate
from diffusers_learngene.learngene.generated import ADAPTER, NOVEL
from diffusers_learngene.tuners.scalers import plain_name
from models import run


METHODS = ["wave", "fine", "kind"]


def make(name, method):
    """A descendant, of another depth where the method has them."""
    if method == "kind":
        fields = {"num_classes": 10, "num_learngene": 3, "tailors_per_class": 1}
        return Learngene.condense(ancestry(name).model, KINDConfig(**fields)).descend()
    return learngene(name, method).descend(**depth(name, 4))


def state(model):
    """Copies of all that a model holds, by plain name."""
    return {plain_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor.numel()}


def trained(model):
    """Names of the parameters that are trained; of a tied one, all that it has."""
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(name) for name, parameter in named if parameter.requires_grad}


def saved(folder):
    return {plain_name(name) for name in load_file(folder / "adapter_model.safetensors")}


def disturb_(model):
    """As training would: everything that it moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_trains_is_saved_and_loaded(name, method, tmp_path):
    """Into a stock model that shares with the descendant only what is frozen."""
    torch.manual_seed(0)
    descendant = disturb_(make(name, method))
    names = trained(descendant)
    banks = {plain_name(key) for key in descendant.state_dict() if "_bank." in key}
    descendant.save_pretrained(tmp_path)
    in_file = {key.replace(f".{ADAPTER}.", ".") for key in names | banks}
    assert saved(tmp_path) == in_file and (method == "kind") == (banks <= names)

    fresh = stock_like(name, descendant)
    for key, tensor in state(descendant).items():
        if key in fresh.state_dict() and key not in names:
            fresh.state_dict()[key].copy_(tensor)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True).eval()
    assert trained(loaded) == names
    assert_same(state(loaded), state(descendant))
    inputs = ancestry(name).inputs
    torch.testing.assert_close(run(loaded, inputs), run(descendant, inputs), rtol=1e-4, atol=1e-5)
    assert not trained(PeftModel.from_pretrained(stock_like(name, descendant), tmp_path))


def stock_like(name, descendant):
    """A stock model of a descendant's size, of other weights."""
    base = descendant.get_base_model()
    torch.manual_seed(1)
    cls = type(base)
    if hasattr(cls, "config_class"):
        return cls(cls.config_class.from_dict(base.config.to_dict()))
    return cls.from_config(base.config)


def test_the_bank_stays_frozen(tmp_path):
    """Whichever adapter is activated when."""
    descendant = learngene("vit", "wave").descend()
    names = trained(descendant)
    descendant.set_adapter(ADAPTER)
    assert trained(descendant) == names
    descendant.set_adapter(ADAPTER, inference_mode=True)
    assert not trained(descendant)
    descendant.base_model.set_requires_grad(ADAPTER, True)
    assert trained(descendant) == names


def test_new_classes(tmp_path):
    """Tailors and label rows of the new classes, and nothing of the old ones."""
    torch.manual_seed(0)
    one = Learngene.condense(ancestry("dit").model, KINDConfig(num_learngene=6, tailors_per_class=2))
    model, other = disturb_(one.descend(num_new_classes=2)), one.descend(num_new_classes=2, seed=1)
    model.save_pretrained(tmp_path)
    assert saved(tmp_path / NOVEL) == {key.replace(f".{NOVEL}.", ".") for key in trained(model)}
    other.load_adapter(tmp_path, ADAPTER)
    other.load_adapter(tmp_path / NOVEL, NOVEL)
    assert_same(state(other), state(model))
    assert trained(other) == trained(model)


# ----------------------------------------------------------------------------------------------------- HF's Trainer


class Images(Dataset):
    """16 random images of three classes."""

    def __init__(self, side):
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, side, side, generator=draws)
        self.y = torch.randint(0, 3, (16,), generator=draws)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": self.y[index]}


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def cvt():
    """Batch norms in its blocks, whose statistics training moves without a gradient."""
    return CvtForImageClassification(
        CvtConfig(
            embed_dim=[8, 8],
            num_heads=[1, 1],
            depth=[2, 2],
            drop_path_rate=[0.0, 0.0],
            patch_sizes=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
            num_labels=3,
        )
    )


class Recorder(TrainerCallback):
    """The state of the model at every save."""

    def __init__(self):
        self.states = {}

    def on_save(self, args, state_, control, model=None, **_):
        self.states[state_.global_step] = state(model)


def train(model, folder, resume=None, metrics=None, **arguments):
    """Six steps, saved every other; returns what was recorded."""
    recorder = Recorder()
    arguments = TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_strategy="no",
        **arguments,
    )
    images = Images(8)
    data = {"train_dataset": images, "eval_dataset": images}
    trainer = Trainer(model, arguments, callbacks=[recorder], compute_metrics=metrics, **data)
    gated = model.peft_config[ADAPTER].peft_type == "LEARNGENE_KIND"
    with contextlib.redirect_stdout(io.StringIO()), class_gate(model, 1) if gated else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    return recorder.states, trainer.state


@pytest.fixture(params=["vit-wave", "vit-fine", "vit-kind", "cvt-wave"])
def descend(request):
    """Makes a descendant of that learngene."""
    name, method = request.param.split("-")
    torch.manual_seed(0)
    model = {"vit": vit, "cvt": cvt}[name]().eval()
    config = KINDConfig(num_classes=3) if method == "kind" else lossless(model, method)
    return Learngene.condense(model, config).descend


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_resumes_exactly(descend, tmp_path):
    whole, resumed = descend(), descend()
    states, _ = train(whole, tmp_path)
    assert any(not torch.equal(states[2][name], tensor) for name, tensor in states[6].items())
    train(resumed, tmp_path, tmp_path / "checkpoint-4")
    assert_same(state(resumed), states[6])
    assert_same(state(resumed), state(whole))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_loads_the_best_model(descend, tmp_path):
    """Also if it is the first: as a whole, not what the file happens to hold of it."""
    model = descend()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps"}
    options |= {"metric_for_best_model": "place", "greater_is_better": False}
    places = itertools.count()
    states, end = train(model, tmp_path, metrics=lambda _: {"place": next(places)}, **options)
    assert end.best_model_checkpoint.endswith("checkpoint-2")
    assert_same(state(model), states[2])


def test_trainer_and_new_classes(tmp_path):
    """It activates one adapter, which alone has no weights: that is an error rather than half a model."""
    torch.manual_seed(0)
    one = Learngene.condense(vit().eval(), KINDConfig(num_classes=3))
    model = one.descend(num_new_classes=1)
    assert model.active_adapters == [NOVEL, ADAPTER]
    train(model, tmp_path)
    with pytest.raises(RuntimeError, match="an adapter with mode=.generate. replaced it. Activate that adapter"):
        train(one.descend(num_new_classes=1), tmp_path, tmp_path / "checkpoint-4")
