# SPDX-License-Identifier: Apache-2.0
"""A world small enough for a CLIP to learn it on the spot, so that CreTok can be shown where there are no weights.

Every concept has a look: an outline, a colour, stripes. The picture of a pair is a blend of the two looks. Half of the
world is not concepts but materials, which fill the picture and mix likewise, so that "a photo of a mixture" is far
from saying of what. Adjectives change how something is shown; "creative" is one of them, said of odd materials only,
so that the word alone is far from blends of concepts, and the token has a way to go. A CLIP of two small towers learns
which caption goes with which picture, as the real one did. It is never shown a pair that is to be measured on, nor a
mixture whose caption does not name what is mixed.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..runs.sampler import seeded_generator
from .pairs import Pair, PairList


__all__ = ["ToyWorld", "create_clip", "train_clip_tokenizer"]

SIZE = 32  # pixels
_WAVES = 6  # of an outline
ADJECTIVES = ("", "small", "large", "dark", "bright", "creative")
MATERIALS = (
    "sky sand water grass snow brick wood marble rust smoke leather paper velvet stone ice fire clay glass foam "
    "gravel moss silk tile rain"
)
SINGLE = ("a {a} {x}", "a photo of a {a} {x}")
PAIR = (
    "a {x} {y}",
    "a photo of a {x} {y}",
    "a mixture of a {x} and a {y}",
    "a photo of a {a} mixture that resembles a {x} and a {y}",
)


class ToyWorld:
    """Pictures and captions of concepts and of blends of two; all that is random comes from the generators given.

    Args:
        pairs: their concepts are those of the world; their held-out and unseen pairs are never shown.
        seed: of the looks.
    """

    def __init__(self, pairs: PairList, *, seed: int = 0) -> None:
        self.words = list(dict.fromkeys([*pairs.concepts, *MATERIALS.split()]))
        draws, number = seeded_generator(seed), len(self.words)
        strength = 0.3 * torch.randn(number, _WAVES, generator=draws) / torch.arange(1.0, _WAVES + 1)
        turns = torch.rand(number, _WAVES, generator=draws) * 2 * math.pi
        hue, light = torch.rand(2, number, 1, generator=draws)
        color = 0.4 * light + 0.6 * (0.5 + 0.5 * torch.cos(2 * math.pi * (hue + torch.arange(3) / 3)))
        stripes = torch.randn(number, 2, generator=draws) * 5
        fills = torch.tensor([[float(word not in pairs.concepts)] for word in self.words])
        # (words, 2 * _WAVES + 6): an outline as a Fourier series, a colour, stripes, and whether it fills the picture.
        self.looks = torch.cat([strength * turns.cos(), strength * turns.sin(), color, stripes, fills], dim=1)
        hidden = {frozenset(pair) for pair in (*pairs.held_out, *pairs.unseen)}
        kinds = [[(i, word) for i, word in enumerate(self.words) if fills[i] == kind] for kind in (0, 1)]
        # (pairs, 2) each, places in `words`: of concepts, of materials
        self.shown_pairs = [
            torch.tensor([(i, j) for i, x in kind for j, y in kind if i != j and frozenset((x, y)) not in hidden])
            for kind in kinds
        ]

    def captions(self) -> list[str]:
        """Every word that a caption may have, for a tokenizer to learn from."""
        forms = [form for template in (*SINGLE, *PAIR) for form in {template.replace("{a}", a) for a in ADJECTIVES}]
        texts = [form.format(x=x, y=x) for form in sorted(forms) for x in self.words]
        return [" ".join(text.split()) for text in texts]

    def draw(self, number: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Captions, and pictures (number, 3, SIZE, SIZE) in [-1, 1]: half concepts, half materials; a third single."""
        singles = torch.rand(number, generator=generator) < 1 / 3
        kinds = torch.rand(number, 1, generator=generator) < 0.5
        of_things = kinds.flatten().tolist()
        of_concepts, of_materials = (
            pairs[torch.randint(len(pairs), (number,), generator=generator)] for pairs in self.shown_pairs
        )
        rows = torch.where(kinds, of_concepts, of_materials)
        adjectives = torch.randint(len(ADJECTIVES), (number,), generator=generator).tolist()
        forms = torch.randint(1000, (number,), generator=generator).tolist()
        share = 0.5 + 0.15 * (2 * torch.rand(number, 1, generator=generator) - 1)
        share = torch.where(singles[:, None], torch.ones(()), share)
        looks = share * self.looks[rows[:, 0]] + (1 - share) * self.looks[rows[:, 1]]
        captions = []
        for index, (single, (i, j)) in enumerate(zip(singles.tolist(), rows.tolist(), strict=True)):
            templates = SINGLE if single else PAIR
            template = templates[forms[index] % len(templates)]
            if "{a}" not in template or ADJECTIVES[adjectives[index]] == "creative" and of_things[index]:
                adjectives[index] = 0
            text = template.format(a=ADJECTIVES[adjectives[index]], x=self.words[i], y=self.words[j])
            captions.append(" ".join(text.split()))
        return captions, self.render(looks, [ADJECTIVES[a] for a in adjectives], generator)

    def render(self, looks: Tensor, adjectives: Sequence[str], generator: torch.Generator) -> Tensor:
        """Pictures (n, 3, SIZE, SIZE) in [-1, 1] of looks (n, features), each a little moved, turned and resized."""
        number = len(looks)
        odd = torch.tensor([float(a == "creative") for a in adjectives])[:, None]
        noise = torch.randn(looks.shape, generator=generator)
        # Of its own kind still.
        looks = torch.cat([looks + 0.5 * odd * self.looks.std(0) * noise, looks[:, -1:]], dim=1)
        scale = torch.tensor([{"small": 0.65, "large": 1.4}.get(a, 1.0) for a in adjectives])
        light = torch.tensor([{"dark": 0.5, "bright": 1.5}.get(a, 1.0) for a in adjectives])
        scale = scale * (1 + 0.1 * torch.randn(number, generator=generator))
        shift = 0.1 * torch.randn(number, 2, 1, 1, generator=generator)
        turn = 0.15 * torch.randn(number, 1, 1, generator=generator)

        cos, sin, color, stripes, _, fills = looks.split([_WAVES, _WAVES, 3, 2, 1, 1], dim=1)
        axis = torch.linspace(-1, 1, SIZE)
        y, x = (grid[None] - shift[:, k] for k, grid in enumerate(torch.meshgrid(axis, axis, indexing="ij")))
        angle, radius = torch.atan2(y, x) + turn, (x**2 + y**2).sqrt()
        outline = torch.full_like(angle, 0.55)
        for wave in range(_WAVES):
            turned = (wave + 1) * angle
            outline += 0.3 * (cos[:, wave, None, None] * turned.cos() + sin[:, wave, None, None] * turned.sin())
        reach = outline.clamp(0.15, 0.95) * scale[:, None, None] + 2 * fills[:, :, None]
        inside = torch.sigmoid(20 * (reach - radius))
        wavy = 1 + 0.3 * torch.sin(stripes[:, 0, None, None] * x + stripes[:, 1, None, None] * y)
        paint = (color[:, :, None, None] * (light[:, None, None] * wavy)[:, None]).clamp(0, 1)
        return (inside[:, None] * paint + (1 - inside[:, None])) * 2 - 1  # on white

    def gallery(self, pairs: Sequence[Pair], *, seed: int) -> dict[str, Tensor]:
        """For a picture of the world: the first concept of each pair, their blend, and the second."""
        places = torch.tensor([[self.words.index(word) for word in pair] for pair in pairs])
        first, second = self.looks[places[:, 0]], self.looks[places[:, 1]]
        looks = torch.stack([first, (first + second) / 2, second], dim=1)
        return {
            " + ".join(pair): self.render(row, [""] * 3, seeded_generator(seed, index))
            for index, (pair, row) in enumerate(zip(pairs, looks, strict=True))
        }


def create_clip(tokenizer: Any, *, seed: int, width: int = 64, num_layers: int = 2) -> Any:
    """An untrained `CLIPModel` for pictures of this size and captions of this tokenizer."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": width // 32,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=tower | text, vision_config=tower | {"image_size": SIZE, "patch_size": 8}, projection_dim=width
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(config)


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> Any:
    """A `CLIPTokenizer` whose byte pairs come from these texts, as CLIP's own came from captions."""
    pipeline = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[f"{letter}</w>" for letter in alphabet],  # else their order is another one every time
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
