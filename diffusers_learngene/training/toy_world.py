# SPDX-License-Identifier: Apache-2.0
"""A world small enough to be learned on the spot."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


__all__ = ["train_clip_tokenizer"]


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> Any:
    """A `CLIPTokenizer` whose byte pairs come from these texts, as CLIP's own came from captions."""
    pipeline = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
