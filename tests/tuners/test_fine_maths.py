# SPDX-License-Identifier: Apache-2.0
"""FINE in real models: every weight by hand from the state dict, and the paper's numbers of parameters."""

import pytest
import torch
from peft import get_peft_model

from diffusers_learngene import FINEConfig
from diffusers_learngene.anatomy.dit import DIT_SIZES
from diffusers_learngene.anatomy.models import empty_model
from diffusers_learngene.tuners import shared_groups
from models import MODELS


QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def adapted(name="dit", **fields):
    tiny = MODELS[name]()
    tiny.model = get_peft_model(tiny.model, FINEConfig(init_weights=False, **fields))
    return tiny


@pytest.mark.parametrize("mode", ["add", "generate"])
def test_weights_by_hand(mode):
    """W = U[rows] diag(sigma) V^T, where q, k and v are rows of one matrix with one sigma a layer."""
    plain, tiny = MODELS["dit"]().model.state_dict(), adapted(mode=mode)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in tiny.model.state_dict().items()}
    merged = tiny.model.merge_and_unload().state_dict()
    for layer in range(3):
        for roles in (QKV, ("attn1.to_out.0",), ("ff.net.0.proj",), ("ff.net.2",), ("norm1.linear",)):
            block = f"transformer_blocks.{layer}"
            bank = f"transformer_blocks.0.{roles[0]}.learngene_fine_bank.default"
            u, v = state[f"{bank}.u"], state[f"{bank}.v"]
            sigma = state[f"{block}.{roles[0]}.learngene_fine_sigma.default.weight"]
            found = torch.cat([merged[f"{block}.{role}.weight"] for role in roles])
            base = torch.cat([plain[f"{block}.{role}.weight"] for role in roles]) if mode == "add" else 0
            torch.testing.assert_close(found, base + u @ torch.diag(sigma) @ v.T, rtol=1e-4, atol=1e-5)


def test_apart():
    """Without share_qkv every matrix has its own U, V and sigma."""
    names = [key for key, _ in adapted(share_qkv=False).model.named_parameters() if "learngene_" in key]
    assert sum("_sigma" in name for name in names) == 3 * 7 and sum("_bank" in name for name in names) == 2 * 7


# Section 7 of the note: millions of numbers in U and V at r = D, 1.5 D and 2 D.
COUNTS = [("B", 768, [13.6, 20.4, 27.1]), ("L", 1024, [24.1, 36.2, 48.2])]


@pytest.mark.parametrize(("size", "width", "millions"), COUNTS, ids=["DiT-B", "DiT-L"])
def test_published_numbers(size, width, millions):
    """In the real models: 23 D r numbers in U and V whatever the depth, 5 r in the sigma of a layer."""
    for ratio, expected in zip((1, 1.5, 2), millions, strict=True):
        rank = int(ratio * width)
        for depth in (4, 12):
            config = {**DIT_SIZES[size], "num_layers": depth, "sample_size": 32, "out_channels": 8}
            model = empty_model("DiTTransformer2DModel", config)
            fine = FINEConfig(mode="generate", r=None if rank == width else rank)
            model = get_peft_model(model, fine, low_cpu_mem_usage=True)
            numbers = {"bank": 0, "sigma": 0}
            for name, parameter in model.named_parameters():
                for part in numbers:
                    numbers[part] += parameter.numel() * (f"learngene_fine_{part}" in name)
            assert numbers == {"bank": 23 * width * rank, "sigma": 5 * rank * depth}
            assert numbers["bank"] / 1e6 == pytest.approx(expected, abs=0.06)


def test_who_shares_what():
    """U and V over the layers, sigma within one; one copy of each in the file (`test_laws.test_saving`)."""
    model = adapted("sd3").model
    groups = shared_groups(model)
    qkv = groups["transformer_blocks.*.attn.to_q+to_k+to_v"]
    assert len(qkv.layers) == 9 and len({layer.scaler("default") for layer in qkv.layers.values()}) == 3
    assert [layer.offsets["default"] for layer in qkv.layers.values()] == [0, 16, 32] * 3
    assert [len(layer.banks) for layer in qkv.layers.values()] == [1] + 8 * [0]
    assert [len(layer.scalers) for layer in qkv.layers.values()] == [1, 0, 0] * 3
    status = model.get_layer_status()
    assert all(layer.available_adapters == ["default"] for layer in status)
