# SPDX-License-Identifier: Apache-2.0
"""Tiny text-to-image pipelines, built from configs and with tokenizers trained on the spot; random weights."""

import copy
import functools

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_learngene import CreTok
from diffusers_learngene.data.toy_world import train_clip_tokenizer
from diffusers_learngene.pipelines.token import CreTokConfig


CORPUS = [
    "a photo of a creative mixture that resembles a lettuce and a mantis, oil painting",
    "a bee frog",
    "an owl and a unicorn",
    "a sheep cauliflower",
]
FAMILIES = ("sd", "sdxl", "sd3", "flux")
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}  # of the CLIP encoders; SD and Flux have the first alone
CLIP_ENCODERS = {"sd": 1, "sdxl": 2, "sd3": 2, "flux": 1}


@functools.cache
def clip_vocabulary():
    return train_clip_tokenizer(CORPUS)


def clip_tokenizer():
    """Each one its own, because tokens are added to it."""
    return copy.deepcopy(clip_vocabulary())


def clip_encoder(width, *, projection=None, seed=0, eos_token_id=None):
    tokenizer = clip_tokenizer()
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval().requires_grad_(False)
    encoder.get_input_embeddings().weight.normal_(std=0.3)  # so that one word makes a difference
    return encoder


@functools.cache
def t5_vocabulary():
    words = sorted({word.strip(",") for text in CORPUS for word in text.split()})
    letters = [chr(code) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return [*special, *((f"▁{word}", -3.0) for word in words), *((letter, -8.0) for letter in letters)]


def t5(width):
    vocabulary = t5_vocabulary()
    torch.manual_seed(5)
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    return tokenizer, T5EncoderModel(config).eval().requires_grad_(False)


def vae(latent_channels):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def unet(cross_attention_dim, **config):
    torch.manual_seed(2)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        **config,
    )


def pipeline(family, *, eos_token_id=None):
    """A pipeline of that family: 16 x 16 pixels; with `eos_token_id=2` its CLIP configs are as old as the published
    ones are."""
    clip = functools.partial(clip_encoder, eos_token_id=eos_token_id)
    common = {"tokenizer": clip_tokenizer()}
    if family == "sd":
        return StableDiffusionPipeline(
            **common,
            vae=vae(4),
            text_encoder=clip(16),
            unet=unet(16),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **common,
            vae=vae(4),
            text_encoder=clip(16),
            text_encoder_2=clip(24, projection=24, seed=1),
            tokenizer_2=clip_tokenizer(),
            unet=unet(
                40,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 24,
                transformer_layers_per_block=(1, 1),
            ),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        )
    torch.manual_seed(3)
    if family == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=48,
            pooled_projection_dim=40,
            out_channels=4,
        )
        tokenizer_3, text_encoder_3 = t5(48)
        return StableDiffusion3Pipeline(
            **common,
            transformer=transformer,
            vae=vae(4),
            text_encoder=clip(16, projection=16),
            text_encoder_2=clip(24, projection=24, seed=1),
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer_2, text_encoder_2 = t5(24)
    return FluxPipeline(
        **common,
        transformer=transformer,
        vae=vae(4),
        text_encoder=clip(16),
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def picture(pipe, prompt, **arguments):
    """(H, W, 3) numbers of one image, two steps, seed 0."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images
    return torch.from_numpy(images[0])


def make_cretok(family="sd3", *, seed=0, **config):
    """A token that nobody trained, for the encoders of that family."""
    draws = torch.Generator().manual_seed(seed)
    widths = dict(list(WIDTHS.items())[: CLIP_ENCODERS[family]])
    rows = {name: 0.3 * torch.randn(width, generator=draws) for name, width in widths.items()}
    return CreTok(CreTokConfig(**{"encoders": widths, **config}), rows)


def same(one, other):
    """Whether two images are one. (Where weights lie in memory may change the last bit of a product.)"""
    return bool((one - other).abs().max() < 1e-5)
