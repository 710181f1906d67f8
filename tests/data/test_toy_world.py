# SPDX-License-Identifier: Apache-2.0
import torch

from diffusers_learngene.data.pairs import PairList
from diffusers_learngene.data.toy_world import SIZE, ToyWorld, train_clip_tokenizer
from diffusers_learngene.runs.sampler import seeded_generator


PAIRS = PairList([("bee", "owl"), ("elk", "fox")], [("bee", "elk")], [("yak", "owl")])


def test_what_is_shown():
    captions, pictures = ToyWorld(PAIRS).draw(400, seeded_generator(0))
    assert pictures.shape == (400, 3, SIZE, SIZE) and pictures.abs().max() <= 1 and pictures.isfinite().all()
    named = [{word for word in ("bee", "owl", "elk", "fox", "yak") if word in text.split()} for text in captions]
    assert {"bee", "owl"} in named and {"yak"} in named
    assert {"bee", "elk"} not in named and {"yak", "owl"} not in named  # what is measured on
    creative = [names for names, text in zip(named, captions, strict=True) if "creative" in text]
    assert creative and not any(creative)  # said of materials only


def test_the_world_is_the_same_every_time():
    one, other = ToyWorld(PAIRS, seed=3), ToyWorld(PAIRS, seed=3)
    first, second = one.draw(8, seeded_generator(1)), other.draw(8, seeded_generator(1))
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    tokenizers = [train_clip_tokenizer(world.captions()) for world in (one, other)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    words = ["creative", "mixture", *one.words]
    assert all(len(tokenizers[0](word, add_special_tokens=False).input_ids) == 1 for word in words)
