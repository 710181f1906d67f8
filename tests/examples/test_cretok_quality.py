# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pictures, on random weights: that it runs, and that its scorers score what they should."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from diffusers_learngene.data.toy_world import create_clip
from text_to_image import FAMILIES, clip_tokenizer, make_cretok, pipeline


PIXELS = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PAIR = ("bee", "owl")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    create_clip(tokenizer, seed=0).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**PIXELS), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A chat model with eyes; its patches are replaced for the one image token of the template."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<image>"])
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**towers, image_size=32, patch_size=16, projection_dim=16),
            text_config=LlamaConfig(
                **towers, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that an image makes a difference
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(**PIXELS),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def reward_tensors():
    """Tensors by ImageReward's own names, at small sizes: pixels 32 x 32, patches 8 x 8, widths 128 and 64."""
    draws = np.random.default_rng(0)
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, 128),
        "blip.visual_encoder.pos_embed": (1, 17, 128),
        "blip.visual_encoder.patch_embed.proj": (128, 3, 8, 8),
        "blip.visual_encoder.norm": (128,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (200, 64),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, 64),
        "blip.text_encoder.embeddings.LayerNorm": (64,),
        "blip.vision_proj": (4, 128),  # which the score has no use for
        "mlp.layers.0": (32, 64),
        "mlp.layers.2": (16, 32),
        "mlp.layers.4": (1, 16),
    }
    for i in range(3):
        sides = {"norm1": (128,), "norm2": (128,), "attn.qkv": (384, 128), "attn.proj": (128, 128)}
        sides |= {"mlp.fc1": (512, 128), "mlp.fc2": (128, 512)}
        shapes |= {f"blip.visual_encoder.blocks.{i}.{name}": shape for name, shape in sides.items()}
    for i in range(2):
        sides = {"intermediate.dense": (96, 64), "output.dense": (64, 96), "output.LayerNorm": (64,)}
        for attention, width in (("attention", 64), ("crossattention", 128)):
            sides |= {f"{attention}.self.{name}": (64, width) for name in ("key", "value")}
            sides |= {f"{attention}.self.query": (64, 64), f"{attention}.output.dense": (64, 64)}
            sides |= {f"{attention}.output.LayerNorm": (64,)}
        shapes |= {f"blip.text_encoder.encoder.layer.{i}.{name}": shape for name, shape in sides.items()}
    tensors = {}
    for name, shape in shapes.items():
        alone = name.endswith(("weight", "cls_token", "pos_embed"))
        for key, size in ((name, shape),) if alone else ((f"{name}.weight", shape), (f"{name}.bias", shape[:1])):
            tensors[key] = torch.from_numpy(draws.normal(0, 0.2, size)).float()
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return tensors


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    save_file(reward_tensors(), folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "bee", "owl"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_and_scores(cretok_quality, family, clip, llava, reward, words, tmp_path):
    pipeline(family).save_pretrained(tmp_path / "base")
    for index, theta in enumerate((0.3, 0.5)):
        make_cretok(family, seed=index, training={"theta": [theta]}).save_pretrained(tmp_path / f"token-{index}")
    found = cretok_quality(
        *("--pretrained_model_name_or_path", tmp_path / "base", "--pairs_file", words, "--clip_model", clip),
        *("--cretok", tmp_path / "token-0", tmp_path / "token-1", "--pickscore_model", clip, "--vqa_model", llava),
        *("--imagereward_model", reward, "--imagereward_tokenizer", reward, "--output_dir", tmp_path / "out"),
    )
    assert [row["method"] for row in found["summary"]] == [
        *("creative", "column swap", "CreTok, theta 0.3", "CreTok, theta 0.5")
    ]
    assert len(found["rows"]) == 2 * 4
    assert found["scores"] == ["clip_sum", "clip_imbalance", "pickscore", "imagereward", "vqa"]
    for row in found["summary"][1:]:
        mean, low, high = row["clip_sum - creative"]
        assert low <= mean <= high and row["seconds"] > 0
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["summary"] == found["summary"]
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000


def test_vqa_is_the_share_of_yes(cretok_quality, llava):
    module = cretok_quality.module
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    score = [module.vqa_score(model, processor, picture(seed), PAIR)["vqa"] for seed in (0, 1)]
    assert score[0] != score[1], "the image is not seen"
    question = (
        f'<image><image><image><image> Does this figure show "{module.caption(PAIR)}"? Please answer yes or no. a'
    )
    pixels = processor.image_processor(picture(0), return_tensors="pt").pixel_values
    ids = processor.tokenizer(question, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
    yes, no = (processor.tokenizer(word).input_ids[1] for word in ("yes", "no"))  # after the start of the text
    assert score[0] == pytest.approx(logits[[yes, no]].softmax(0)[0].item(), rel=1e-4)


def test_image_reward_is_the_authors(cretok_quality, reward):
    """The numbers are what the authors' own code gives for these tensors, pixels and words."""
    model = cretok_quality.module.ImageReward(reward, str(reward))
    assert model("a photo of bee", picture(0)) == pytest.approx(-0.250561, abs=1e-4)
    assert model("owl of a bee photo", picture(1)) == pytest.approx(-0.262114, abs=1e-4)
