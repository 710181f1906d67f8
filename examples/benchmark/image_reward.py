# SPDX-License-Identifier: Apache-2.0
"""ImageReward (Xu et al., NeurIPS 2023) as a BLIP of transformers: a ViT, a BERT that looks at it, and linear layers.

Its weights are published as ImageReward.pt, a pickle, which is never read here. Whoever trusts it converts it, once:

    save_file(torch.load("ImageReward.pt", weights_only=True), "model.safetensors")
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessor
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel


HEAD_SIZE = 64  # of BLIP's towers at every size
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of rewards, by which the authors standardise them
MAX_WORDS = 35
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.": ".self_attn.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


class ImageReward:
    """The score of a Pillow image for a prompt.

    Args:
        folder: model.safetensors with the tensors of ImageReward.pt, under their names there; sizes are read off them.
        tokenizer: of BERT, uncased.

    Raises:
        RuntimeError: tensors that are missing, or that no part of the model has.
    """

    def __init__(self, folder: str | Path, tokenizer: str = "google-bert/bert-base-uncased") -> None:
        state = load_file(Path(folder, "model.safetensors"))
        vision, text = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
        vision = {_renamed(name): tensor for name, tensor in vision.items()}
        text.pop("embeddings.position_ids", None)
        self.vision, self.text, self.mlp = _vision_model(vision), _text_model(text), _mlp(_part(state, "mlp.layers."))
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        size = self.vision.config.image_size
        crop = {"height": size, "width": size}
        self.images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop)

    def to(self, device: str) -> "ImageReward":
        for part in (self.vision, self.text, self.mlp):
            nn.Module.to(part, device)
        return self

    @torch.no_grad()
    def __call__(self, prompt: str, image: Any) -> float:
        device = self.vision.device
        pixels = self.images(image.convert("RGB"), return_tensors="pt").pixel_values.to(device)
        words = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        ).to(device)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        return ((self.mlp(read.last_hidden_state[:, 0].float()).item()) - MEAN) / STD


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for old, new in VISION_NAMES.items():
        name = re.sub(rf"^{re.escape(old)}" if old[0] != "." else re.escape(old), new, name)
    return name


def _layers(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _vision_model(state: dict[str, Tensor]) -> BlipVisionModel:
    patches, positions = state["embeddings.patch_embedding.weight"], state["embeddings.position_embedding"]
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=patches.shape[0] // HEAD_SIZE,
        patch_size=patches.shape[-1],
        image_size=round((positions.shape[1] - 1) ** 0.5) * patches.shape[-1],
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config).eval()
    model.load_state_dict(state)
    return model


def _text_model(state: dict[str, Tensor]) -> BlipTextModel:
    words = state["embeddings.word_embeddings.weight"]
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=words.shape[1] // HEAD_SIZE,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # for the layers that attend to the image
    )
    model = BlipTextModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(state)
    return model


def _mlp(state: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers, one after the other: the authors' have nothing but dropout between them."""
    numbers = sorted({int(name.split(".")[0]) for name in state})
    layers = {str(n): nn.Linear(*state[f"{n}.weight"].shape[::-1]) for n in numbers}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.load_state_dict(state)
    return model.eval()
