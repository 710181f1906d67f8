# SPDX-License-Identifier: Apache-2.0
"""Pairs of concepts, from a file: what CreTok is trained with, and measured on."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


__all__ = ["Pair", "PairList", "read_pairs"]

Pair = tuple[str, str]


@dataclass(frozen=True)
class PairList:
    """Pairs by what they are for; no pair, in either order, is for two things.

    Attributes:
        train: to train with.
        held_out: of the same concepts, to measure on.
        unseen: to measure on, with concepts that occur in no training pair.
    """

    train: list[Pair]
    held_out: list[Pair]
    unseen: list[Pair]

    @property
    def concepts(self) -> list[str]:
        """All concepts, each once."""
        return list(dict.fromkeys(word for pair in (*self.train, *self.held_out, *self.unseen) for word in pair))


def read_pairs(path: str | os.PathLike[str]) -> PairList:
    """Pairs of a text file, all to train with, or of a JSON file with the keys train, held_out and unseen.

    A line of text is "lettuce, mantis" (or has a tab between the two); empty lines, and what begins with #, are passed
    over. In JSON a pair is a list of two; the last two keys may be missing.

    Raises:
        ValueError: a line (an entry) that is no pair, or is there twice, with its number; no file; no pair at all.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"pairs_file={str(path)!r} cannot be read: {error}.") from error
    if Path(path).suffix == ".json":
        entries = _json_entries(text, path)
    else:
        lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
        filled = [(place, line) for place, line in lines if line and not line.startswith("#")]
        named = [(place, line.split("\t" if "\t" in line else ",")) for place, line in filled]
        entries = {"train": named}
    places: dict[frozenset[str], str] = {}
    pairs = {key: [_pair(entry, place, path, places) for place, entry in rows] for key, rows in entries.items()}
    if not pairs.get("train"):
        raise ValueError(f"pairs_file={str(path)!r} holds no pair to train with.")
    return PairList(pairs["train"], pairs.get("held_out", []), pairs.get("unseen", []))


def _json_entries(text: str, path: str | os.PathLike[str]) -> dict[str, list[tuple[str, Any]]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"pairs_file={str(path)!r} is no JSON: {error}.") from error
    keys = [key for key in ("train", "held_out", "unseen") if isinstance(values, dict) and key in values]
    if "train" not in keys or not all(isinstance(values[key], list) for key in keys):
        raise ValueError(
            f'pairs_file={str(path)!r} must be {{"train": [["lettuce", "mantis"], ...]}}, as a JSON file.'
        )
    return {key: [(f"{key}[{index}]", entry) for index, entry in enumerate(values[key])] for key in keys}


def _pair(entry: Any, place: str, path: str | os.PathLike[str], places: dict[frozenset[str], str]) -> Pair:
    words = [word.strip() if isinstance(word, str) else "" for word in entry] if isinstance(entry, list) else []
    if len(words) != 2 or not all(words) or words[0] == words[1]:
        shown = ",".join(entry) if place.startswith("line") else json.dumps(entry)
        raise ValueError(f'{path}, {place}: {shown!r} is no pair of two concepts: write "lettuce, mantis".')
    if (first := places.setdefault(frozenset(words), place)) != place:
        raise ValueError(f"{path}, {place}: the pair {', '.join(words)} is there already, in {first}.")
    return words[0], words[1]
