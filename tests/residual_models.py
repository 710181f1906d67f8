# SPDX-License-Identifier: Apache-2.0
"""More tiny models, of blocks that end their residual branches in other ways: `RESIDUAL_MODELS[name]()`."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel, HunyuanDiT2DModel, Kandinsky5Transformer3DModel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJModel,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5Model,
)

from models import MODELS, Tiny, ids, noise, seeded


def _causal(model: type, config: type, **more: Any) -> Callable[[], Tiny]:
    def make() -> Tiny:
        values = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }
        return Tiny(model(config(**(values | more))), {"input_ids": ids(40, 2, 6)})

    return make


def _gptj() -> Tiny:
    config = GPTJConfig(
        vocab_size=40, n_embd=16, n_layer=3, n_head=2, rotary_dim=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return Tiny(GPTJModel(config), {"input_ids": ids(40, 2, 6)})


def _t5() -> Tiny:
    model = T5Model(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))
    return Tiny(model, {"input_ids": ids(40, 2, 6), "decoder_input_ids": ids(40, 2, 5), "use_cache": False})


def _swinv2() -> Tiny:
    config = Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=4, num_channels=3
    )
    return Tiny(Swinv2Model(config), {"pixel_values": noise(2, 3, 16, 16)})


def _hunyuandit() -> Tiny:
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=12,
        text_len=4,
        text_len_t5=4,
    )
    inputs = {
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": noise(2, 4, 12),
        "text_embedding_mask": torch.ones(2, 4, dtype=torch.long),
        "encoder_hidden_states_t5": noise(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4, dtype=torch.long),
        "image_meta_size": torch.full((2, 6), 8.0),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (noise(16, 8), noise(16, 8)),
    }
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), **inputs})


def _hidream() -> Tiny:
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[12, 12],
        text_emb_dim=12,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 0, 1],
    )
    inputs = {
        "timesteps": torch.tensor([3, 500]),
        "encoder_hidden_states_t5": noise(2, 3, 12),
        "encoder_hidden_states_llama3": noise(2, 2, 3, 12),
        "pooled_embeds": noise(2, 12),
    }
    return Tiny(model, {"hidden_states": noise(2, 4, 8, 8), **inputs})


def _kandinsky() -> Tiny:
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=12,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(8, 4, 4),
    )
    inputs = {
        "encoder_hidden_states": noise(1, 3, 12),
        "timestep": torch.tensor([3.0]),
        "pooled_projections": noise(1, 12),
        "visual_rope_pos": [torch.arange(1), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(3),
    }
    return Tiny(model, {"hidden_states": noise(1, 1, 4, 4, 4), **inputs})


RESIDUAL_MODELS = MODELS | {
    name: seeded(factory)
    for name, factory in {
        "olmo2": _causal(Olmo2ForCausalLM, Olmo2Config),
        "gemma2": _causal(Gemma2ForCausalLM, Gemma2Config, head_dim=8),
        "gemma3": _causal(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8),
        "phi3": _causal(Phi3ForCausalLM, Phi3Config),
        "mixtral": _causal(MixtralForCausalLM, MixtralConfig, num_local_experts=3),
        "gptj": _gptj,
        "t5_decoder": _t5,
        "swinv2": _swinv2,
        "hunyuandit": _hunyuandit,
        "hidream": _hidream,
        "kandinsky": _kandinsky,
    }.items()
}
