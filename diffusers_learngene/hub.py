# SPDX-License-Identifier: Apache-2.0
"""Saving a learngene, pushing it to the Hugging Face Hub, and fetching it from there or from a folder."""

import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor

from .artefact import WEIGHTS, ArtefactConfig, find_artefact, read_artefact, write_artefact
from .cards import card_images, model_card
from .files import write
from .models import empty_model, tensors_of


Self = TypeVar("Self", bound="SharedArtefact")


class SharedArtefact(
    ModelHubMixin, library_name="diffusers-learngene", tags=["learngene", "safetensors"], license="apache-2.0"
):
    """What can be saved, pushed and fetched: a config and tensors, with what else its card is to say."""

    config: ArtefactConfig
    tensors: dict[str, Tensor]
    card: dict[str, Any]

    def __init__(self, config: ArtefactConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self.card = {}

    @property
    def num_parameters(self) -> int:
        """Numbers in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def ancestry_parameters(self) -> int:
        """Numbers of the ancestry model (tied tensors once)."""
        model = empty_model(self.config.architecture, self.config.base_config)
        return sum(tensor.numel() for tensor in tensors_of(model).values())

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write model.safetensors, config.json, README.md and the card's images, each atomically; perhaps push them.

        Returns:
            The address of the commit, if pushed.
        """
        card = {**self.card, **(model_card_kwargs or {})}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_artefact(folder, self.config, self.tensors)
        for image in card_images(card):
            write(folder / image.name, partial(shutil.copyfile, image))
        write(folder / "README.md", self.generate_model_card(**card).save)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """As `ModelHubMixin.push_to_hub`; nothing but what `save_pretrained` writes is ever uploaded."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        kwargs["allow_patterns"] = [WEIGHTS, "config.json", "README.md", "*.png"]
        return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The learngene of a folder, or of a repository on the Hub; without a network, as it was last downloaded.

        Raises:
            LearngeneError: there is none, or it is damaged. The errors of `huggingface_hub` come as they are.
        """
        file = find_artefact(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        return cls(*read_artefact(file))

    def generate_model_card(self, *_: object, **card_kwargs: Any) -> ModelCard:
        """The model card from hub_cards/<method>.md, with what is in `self.card`."""
        from . import __version__

        own = {
            "num_parameters": self.num_parameters,
            "ancestry_parameters": self.ancestry_parameters,
            "version": __version__,
        }
        return model_card(self.config, own | self.card | {k: v for k, v in card_kwargs.items() if v is not None})
