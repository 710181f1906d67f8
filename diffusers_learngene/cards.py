# SPDX-License-Identifier: Apache-2.0
"""Model cards of learngenes: hub_cards/learngene.md, of which every method fills in what is its own."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FunctionLoader


if TYPE_CHECKING:
    from .artefact import ArtefactConfig


__all__ = ["card_images", "model_card", "render"]


def model_card(config: "ArtefactConfig", card: dict[str, Any]) -> ModelCard:
    """The card of a learngene, from hub_cards/<method>.md.

    Args:
        card: what the description does not say: repo_id, results, images, training, license, ...; all optional.
    """
    from .models import sizes_of  # which imports all of diffusers; the other functions here are for other cards, too

    data = ModelCardData(
        library_name="diffusers-learngene",
        license=card.get("license") or "apache-2.0",
        base_model=config.ancestry,
        tags=["learngene", config.method, "safetensors"],
    )
    variables = {
        "architecture": config.architecture,
        "ancestry": config.ancestry,
        "seen_sizes": config.condensed_for,
        "base_config": sizes_of(config.base_config),
        "num_classes": len(config.class_tailors or ()),
        "known_classes": [index for index, units in enumerate(config.class_tailors or ()) if units is not None],
        **card,
        "images": [image.name for image in card_images(card)],
    }
    return ModelCard(render(config.method, data, **variables))


def render(method: str, data: ModelCardData, **variables: Any) -> str:
    """hub_cards/<method>.md with these metadata and variables."""
    folder = files("diffusers_learngene.hub_cards")
    environment = Environment(loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")))
    return environment.get_template(f"{method}.md").render(card_data=data.to_yaml(), **data.to_dict() | variables)


def card_images(card: dict[str, Any]) -> list[Path]:
    """The PNG files that a card names and that exist."""
    return [Path(path) for path in card.get("images") or () if str(path).endswith(".png") and Path(path).is_file()]
