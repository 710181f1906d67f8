# SPDX-License-Identifier: Apache-2.0
"""Makes cangjie_style.json, the pairs that train_cretok.py trains and measures with.

    python examples/data/make_cangjie_style.py

The paper's list, CangJie, is not public; what is known of it is its form: about 60 common concepts, 200 pairs to
train with, 27 to test with. This is a list of that form, re-built: not the authors' file, and numbers measured with it
are not theirs. Five of the 27 are pairs that the literature shows. One concept a group occurs in no training pair.
"""

import json
import random
from itertools import combinations
from pathlib import Path


GROUPS = {
    "mammals": "sheep giraffe elephant rabbit fox horse panda tiger hedgehog squirrel",
    "birds": "peacock chicken owl penguin parrot swan eagle flamingo duck toucan",
    "reptiles, amphibians, fish": "frog turtle chameleon crocodile snake lizard lionfish goldfish shark seahorse",
    "insects, molluscs": "mantis bee butterfly beetle dragonfly ladybug snail octopus grasshopper moth",
    "fruit": "strawberry pineapple banana watermelon orange kiwi grape pear dragonfruit pomegranate",
    "vegetables, flowers": "lettuce cauliflower broccoli pumpkin carrot mushroom artichoke sunflower rose tulip",
}
UNSEEN = ["squirrel", "toucan", "seahorse", "moth", "pomegranate", "tulip"]
KNOWN = [("lettuce", "mantis"), ("cauliflower", "sheep"), ("giraffe", "peacock"), ("bee", "frog")]
KNOWN += [("butterfly", "chicken")]
NUM_TRAIN, NUM_HELD_OUT, NUM_UNSEEN = 200, 27, 24
SEED = 0


def make() -> dict:
    draws = random.Random(SEED)
    groups = {name: words.split() for name, words in GROUPS.items()}
    group_of = {concept: name for name, concepts in groups.items() for concept in concepts}
    across = [pair for pair in combinations(group_of, 2) if group_of[pair[0]] != group_of[pair[1]]]
    draws.shuffle(across)
    taken = {frozenset(pair) for pair in KNOWN}
    unseen = [pair for pair in across if set(pair) & set(UNSEEN)]
    seen = [pair for pair in across if not set(pair) & set(UNSEEN) and frozenset(pair) not in taken]
    held_out = KNOWN + evenly(seen, NUM_HELD_OUT - len(KNOWN), draws)
    taken = {frozenset(pair) for pair in held_out}
    train = evenly([pair for pair in seen if frozenset(pair) not in taken], NUM_TRAIN, draws)
    return {
        "name": "CangJie-style (re-built)",
        "about": "Re-built by make_cangjie_style.py; not the list of the CreTok paper, which is not public.",
        "seed": SEED,
        "groups": groups,
        "unseen_concepts": UNSEEN,
        "train": train,
        "held_out": held_out,
        "unseen": evenly(unseen, NUM_UNSEEN, draws),
    }


def evenly(pairs: list, number: int, draws: random.Random) -> list:
    """That many of the pairs, every concept about as often as any other, in either order."""
    count: dict = {concept: 0 for pair in pairs for concept in pair}
    chosen, left = [], list(pairs)
    for _ in range(number):
        pair = min(left, key=lambda pair: (count[pair[0]] + count[pair[1]], max(count[pair[0]], count[pair[1]])))
        left.remove(pair)
        for concept in pair:
            count[concept] += 1
        chosen.append(pair if draws.random() < 0.5 else pair[::-1])
    return chosen


def to_json(values: dict) -> str:
    """One line a pair or a group, so that a change is a line in a diff."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list) and isinstance(value[0], (list, tuple)):
            rows = ",\n    ".join(json.dumps(list(pair)) for pair in value)
            lines.append(f"{json.dumps(key)}: [\n    {rows}\n  ]")
        elif isinstance(value, dict):
            rows = ",\n    ".join(f"{json.dumps(name)}: {json.dumps(items)}" for name, items in value.items())
            lines.append(f"{json.dumps(key)}: {{\n    {rows}\n  }}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


if __name__ == "__main__":
    Path(__file__).with_name("cangjie_style.json").write_text(to_json(make()), encoding="utf-8")
