# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many architectures, made on the spot: `MODELS[name]()` is one with seeded weights and inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from diffusers_learngene import class_gate
from diffusers_learngene.tuners.kind import KINDLayer


@dataclass
class Tiny:
    """A model in eval mode and the inputs of one call."""

    model: nn.Module
    inputs: dict[str, Any]

    def __call__(self) -> Tensor:
        return run(self.model, self.inputs)


# What `run` tells KIND's tailors the samples are; any class would do, as long as there is one.
CLASS = 3


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's main output as one tensor."""
    with gate(model, [CLASS] * len(next(iter(inputs.values())))):
        return output_of(model(**inputs))


def output_of(output: Any) -> Tensor:
    """The main tensor of what a model returns."""
    for name in ("sample", "logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output if isinstance(output, Tensor) else output[0]


def gate(model: Any, classes: list[int]) -> AbstractContextManager[None]:
    """KIND's gate where the model, which may be any callable, has one."""
    gated = isinstance(model, nn.Module) and any(isinstance(module, KINDLayer) for module in model.modules())
    return class_gate(model, classes) if gated else nullcontext()


class Block(nn.Module):
    """x + down(tanh(up(norm(x))))"""

    def __init__(self, up: nn.Module, down: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.norm = up, down, norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class MLP(nn.Module):
    """Blocks of two matrices whose sides templates of 8 do not divide; `head` repeats nothing."""

    def __init__(self, make_linear: Callable[[int, int], nn.Module], dim: int = 20, hidden: int = 28) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(make_linear(dim, hidden), make_linear(hidden, dim), nn.LayerNorm(dim)) for _ in range(3)
        )
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvNet(nn.Module):
    """Blocks of 1x1 convolutions, and one with a stride and a padding."""

    def __init__(self, dim: int = 20, hidden: int = 28) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1, bias=False), nn.Identity()) for _ in range(3)
        )
        self.shortcut = nn.Conv2d(dim, dim, 1, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.shortcut(x)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


def _mlp() -> Tiny:
    return Tiny(MLP(nn.Linear), {"x": noise(2, 5, 20)})


def _conv1d() -> Tiny:
    return Tiny(MLP(lambda inputs, outputs: Conv1D(outputs, inputs)), {"x": noise(2, 5, 20)})


def _conv2d() -> Tiny:
    return Tiny(ConvNet(), {"x": noise(2, 20, 4, 4)})


def _dit() -> Tiny:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
        patch_size=2,
    )
    inputs = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 7])}
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), **inputs})


def _pixart() -> Tiny:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    inputs = {"encoder_hidden_states": noise(2, 3, 12), "timestep": torch.tensor([3, 500])}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), **inputs})


def _sd3() -> Tiny:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    inputs = {"encoder_hidden_states": noise(2, 3, 12), "pooled_projections": noise(2, 10)}
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3.0, 500.0]), **inputs})


def _flux() -> Tiny:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {"encoder_hidden_states": noise(2, 3, 12), "pooled_projections": noise(2, 10)}
    ids = {"img_ids": noise(16, 3), "txt_ids": torch.zeros(3, 3)}
    return Tiny(model, {"hidden_states": noise(2, 16, 4), "timestep": torch.tensor([0.1, 0.5]), **inputs, **ids})


def _sana() -> Tiny:
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=1,
    )
    inputs = {"encoder_hidden_states": noise(2, 3, 12), "timestep": torch.tensor([3, 500])}
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), **inputs})


def _lumina2() -> Tiny:
    model = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=12,
    )
    inputs = {"encoder_hidden_states": noise(2, 3, 12), "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([0.1, 0.5]), **inputs})


_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _vit() -> Tiny:
    return Tiny(ViTForImageClassification(ViTConfig(**_VIT, num_labels=5)), {"pixel_values": noise(2, 3, 8, 8)})


def _deit() -> Tiny:
    return Tiny(DeiTModel(DeiTConfig(**_VIT), add_pooling_layer=False), {"pixel_values": noise(2, 3, 8, 8)})


def _gpt2() -> Tiny:
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    return Tiny(GPT2LMHeadModel(config), {"input_ids": ids(40, 2, 6)})


def _llama() -> Tiny:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return Tiny(LlamaForCausalLM(config), {"input_ids": ids(40, 2, 6)})


def _t5() -> Tiny:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    return Tiny(T5EncoderModel(config), {"input_ids": ids(40, 2, 6)})


_FACTORIES: dict[str, Callable[[], Tiny]] = {
    "mlp": _mlp,
    "conv1d": _conv1d,
    "conv2d": _conv2d,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "sana": _sana,
    "lumina2": _lumina2,
    "vit": _vit,
    "deit": _deit,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
}


def seeded(factory: Callable[[], Tiny]) -> Callable[[], Tiny]:
    def make(seed: int = 0) -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tiny = factory()
        tiny.model.eval()
        return tiny

    return make


MODELS: dict[str, Callable[..., Tiny]] = {name: seeded(factory) for name, factory in _FACTORIES.items()}
