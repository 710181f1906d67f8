# SPDX-License-Identifier: Apache-2.0
"""A block that is watched in a real call shows what following it without numbers shows, and more where that fails."""

import pytest
import torch
from torch import nn
from transformers import JambaConfig, JambaModel, MambaConfig, MambaModel

from diffusers_learngene.anatomy import Anatomy
from diffusers_learngene.anatomy.examples import example_inputs
from diffusers_learngene.anatomy.kinds import kinds_of_blocks
from diffusers_learngene.anatomy.recorded import recorded_traces
from diffusers_learngene.anatomy.residual import block_ends
from residual_models import RESIDUAL_MODELS


@pytest.mark.parametrize("name", RESIDUAL_MODELS)
def test_both_ways_of_reading_a_block_agree(name):
    tiny = RESIDUAL_MODELS[name]()
    anatomy = Anatomy(tiny.model)
    before = {key: tensor.clone() for key, tensor in tiny.model.state_dict().items()}
    modes = [module.training for module in tiny.model.modules()]
    traces = recorded_traces(tiny.model, tiny.inputs, [kind.paths[0] for kind in anatomy.blocks])
    for kind in anatomy.blocks:
        block, found = tiny.model.get_submodule(kind.paths[0]), traces[kind.paths[0]]
        experts = {name for name in kind.ends if ".experts." in name}  # some may have had no token
        ends, lost = block_ends(block, found.outputs)
        assert {**ends, **{name: kind.ends[name] for name in experts}} == kind.ends and lost == kind.lost
        assert found.read_outside == kind.trace.read_outside
    assert [module.training for module in tiny.model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in tiny.model.state_dict().items())


class Stubborn(nn.Module):
    """A block whose code asks for a number: following it without any fails."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x):
        scale = {3: 0.5}[x.shape[1]]
        return x + self.down(torch.tanh(self.up(x) @ torch.eye(12))) + scale * (x @ self.gate.weight.T)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Stubborn() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_inputs_show_what_cannot_be_followed():
    model = Stack()
    with pytest.warns(UserWarning, match="Stubborn: its forward cannot be followed.*One call may show more"):
        assert Anatomy.of(model).ends == {} and Anatomy.of(model).uncalled == set()
    anatomy = Anatomy.of(model, {"x": torch.randn(2, 3, 8)})
    assert anatomy.uncalled == {"blocks.0.gate", "blocks.1.gate"}
    assert {name for name in anatomy.blocks[0].ends if name.startswith("down")} == {"down.weight", "down.bias"}
    with pytest.raises(KeyError):  # inputs that were given have to be inputs
        _ = Anatomy.of(model, {"x": torch.randn(1, 1, 8)}).blocks


@pytest.mark.parametrize(
    "make",
    [
        lambda: MambaModel(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=4, state_size=4)),
        lambda: JambaModel(
            JambaConfig(
                vocab_size=40,
                hidden_size=32,
                num_hidden_layers=8,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                mamba_d_state=4,
                num_experts=2,
                num_experts_per_tok=1,
                attn_layer_period=4,
                attn_layer_offset=2,
            )
        ),
    ],
)
def test_state_space_models_read_matrices_without_calling_them(make):
    anatomy = Anatomy.of(make().eval())
    assert not any(kind.reason or kind.lost for kind in anatomy.blocks)
    assert {name.rpartition(".")[2] for name in anatomy.uncalled} >= {"dt_proj"}
    assert not any(target.endswith("dt_proj") for target in anatomy.default_targets)
    watched = kinds_of_blocks(anatomy.model, anatomy.stacks, example_inputs(anatomy.model))
    assert [kind.ends for kind in watched] == [kind.ends for kind in anatomy.blocks]
