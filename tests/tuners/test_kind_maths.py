# SPDX-License-Identifier: Apache-2.0
"""KIND in real models: the paper's parameters and FLOPs, and who owns what."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from diffusers_learngene import KINDConfig, class_gate
from diffusers_learngene.anatomy.dit import DIT_SIZES
from diffusers_learngene.anatomy.models import empty_model
from diffusers_learngene.tuners import shared_groups
from models import MODELS


QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
ROLES = (QKV, ("attn1.to_out.0",), ("ff.net.0.proj",), ("ff.net.2",), ("norm1.linear",))


def dit(size, config=None):
    """A DiT of the paper on the meta device, with 256 tokens; the adapter's sizes are those of one class."""
    model = empty_model("DiTTransformer2DModel", {**DIT_SIZES[size], "sample_size": 32, "out_channels": 8})
    model = model if config is None else get_peft_model(model, config, low_cpu_mem_usage=True)
    return model.to("meta")  # what a class computes when it is built is not there yet


def block_linear_flops(model, targets=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear")):
    """FLOPs of a sample in the adapted layers, as torch counts them (two for a multiply and an add)."""
    inputs = {
        "hidden_states": torch.empty(1, 4, 32, 32, device="meta"),
        "timestep": torch.empty(1, dtype=torch.long, device="meta"),
        "class_labels": torch.empty(1, dtype=torch.long, device="meta"),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counts = counter.get_flop_counts()
    return sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(targets))


# Section 3.2 of the note: learngenes, tailors of one class, millions of numbers in these, GFLOPs, the dense GFLOPs.
PAPER = [("B", 384, 60, 12.7, 33.6, 43.59), ("L", 512, 80, 45.2, 119.4, 154.95)]


@pytest.mark.parametrize(
    ("size", "num_learngene", "tailors", "millions", "gflops", "dense"), PAPER, ids=["DiT-B/2", "DiT-L/2"]
)
def test_published_numbers(size, num_learngene, tailors, millions, gflops, dense):
    config = KINDConfig(
        mode="generate", num_learngene=num_learngene, tailors_per_class=tailors, num_classes=1000, class_groups=[[7]]
    )
    model = dit(size, config)
    width, depth = (DIT_SIZES[size][key] for key in ("attention_head_dim", "num_layers"))
    width *= DIT_SIZES[size]["num_attention_heads"]
    banks = [group.bank for group in shared_groups(model).values()]
    sigmas = [p for name, p in model.named_parameters() if "_sigma" in name]
    assert len(banks) == len(sigmas) == 5 * depth
    assert all(tuple(p.shape) == (num_learngene + tailors,) for p in sigmas)
    factors = sum(p.numel() for bank in banks for p in bank.parameters())
    assert factors == 23 * width * (num_learngene + tailors) * depth
    numbers = factors * tailors // (num_learngene + tailors) + tailors * len(sigmas)
    assert numbers / 1e6 == pytest.approx(millions, abs=0.05)
    assert block_linear_flops(dit(size)) / 1e9 == pytest.approx(dense, abs=0.05)
    assert block_linear_flops(model) / 1e9 == pytest.approx(gflops, abs=0.1)


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_weights_by_hand(mode):
    """W(c) = U[rows] diag(sigma * g(c)) V^T from the state dict: no two layers share, q, k and v of one do."""
    tiny = MODELS["dit"]()
    plain = tiny.model.state_dict()
    config = KINDConfig(mode=mode, init_weights=False, num_learngene=3, tailors_per_class=2, class_groups=[[1], [4]])
    tiny.model = get_peft_model(tiny.model, config)
    plain = {key: tensor.clone() for key, tensor in MODELS["dit"]().model.state_dict().items()}
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in tiny.model.state_dict().items()}
    with class_gate(tiny.model, 4):
        merged = tiny.model.merge_and_unload().state_dict()
    gate = torch.tensor([1.0, 1, 1, 0, 1, 0, 1])
    for layer in range(3):
        for roles in ROLES:
            block = f"transformer_blocks.{layer}"
            name = f"{block}.{roles[0]}.learngene_kind"
            u, v = state[f"{name}_bank.default.u"], state[f"{name}_bank.default.v"]
            weight = u @ torch.diag(gate * state[f"{name}_sigma.default.weight"]) @ v.T
            found = torch.cat([merged[f"{block}.{role}.weight"] for role in roles])
            base = torch.cat([plain[f"{block}.{role}.weight"] for role in roles]) if mode == "add" else 0
            torch.testing.assert_close(found, base + weight, rtol=1e-4, atol=1e-5)


def test_apart():
    """Without share_qkv every matrix has its own U, V and sigma; with it, one a layer and one file entry each."""
    for share_qkv, count in ((True, 3 * 5), (False, 3 * 7)):
        model = get_peft_model(MODELS["dit"]().model, KINDConfig(share_qkv=share_qkv))
        names = [key for key, _ in model.named_parameters() if "learngene_" in key]
        assert [sum(part in name for name in names) for part in ("_sigma", ".u", ".v")] == [count] * 3


@pytest.mark.parametrize("assignment", [{}, {"class_groups": [[1, 2], [2, 3], [5]]}])
def test_xavier_at_init(assignment):
    """A class's weight has Xavier's variance, however many tailors other classes have."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(96, 160)) for _ in range(4))
    config = KINDConfig(mode="generate", num_classes=10, tailors_per_class=40, **assignment)
    model = get_peft_model(torch.nn.ModuleDict({"blocks": blocks}), config)
    with class_gate(model, 5):
        weights = torch.stack([block[0].get_delta_weight("default") for block in model.base_model.model["blocks"]])
    assert weights.var().item() == pytest.approx(2 / 256, rel=0.25)
