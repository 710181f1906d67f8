# SPDX-License-Identifier: Apache-2.0
"""Model cards: hub_cards/artefact.md, of which every kind of artefact and every method fills in what is its own."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FunctionLoader


__all__ = ["card_images", "render"]


def render(template: str, data: ModelCardData, variables: dict[str, Any]) -> ModelCard:
    """The card that hub_cards/<template>.md makes of these metadata and variables."""
    folder = files("diffusers_learngene.hub_cards")
    environment = Environment(loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")))
    text = environment.get_template(f"{template}.md").render(card_data=data.to_yaml(), **data.to_dict() | variables)
    return ModelCard(text)


def card_images(card: dict[str, Any]) -> list[Path]:
    """The PNG files that a card names and that exist."""
    return [Path(path) for path in card.get("images") or () if str(path).endswith(".png") and Path(path).is_file()]
