# SPDX-License-Identifier: Apache-2.0
"""What all kinds of artefacts have in common: being saved, pushed to the Hugging Face Hub, fetched, and their card."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from ..version import __version__
from .cards import card_images, render
from .descriptions import described_file, finite_tensors, read_tensors, write_config, write_described
from .files import local_folder, write


Self = TypeVar("Self", bound="SharedArtefact")
OneFile = TypeVar("OneFile", bound="OneFileArtefact")


class SharedArtefact(ModelHubMixin):
    """Data files, a config.json that repeats their description for readers, a card, and the card's images.

    A kind of artefact sets the class attributes, and says how its data are read and what its card says.
    What is set in `card` (repo_id, results, images, training, license, commit, ...: all optional) goes into the model
    card; images are paths of PNG files, and are copied beside it. Without a `license` none is claimed.
    """

    weights: ClassVar[tuple[str, ...]]  # names of the data files, the first being there always
    others: ClassVar[tuple[str, ...]] = ()  # patterns of files that it may have besides
    key: ClassVar[str]  # of their metadata, where the description is
    error: ClassVar[type[ValueError]]
    config: Any  # the description, a dataclass
    tensors: dict[str, Tensor]
    card: dict[str, Any]

    @property
    def template(self) -> str:
        """Of the card: the name of a file in hub_cards/."""
        raise NotImplementedError

    def card_metadata(self) -> dict[str, Any]:
        """What the card's YAML header says, license aside; as `ModelCardData` takes it."""
        raise NotImplementedError

    def card_variables(self) -> dict[str, Any]:
        """What the template is told, beside `card`."""
        raise NotImplementedError

    def data_files(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of each data file that the artefact has: here, all of them in the first."""
        return {self.weights[0]: self.tensors}

    def write_data(self, folder: Path) -> None:
        """Write the data files and config.json, each atomically; one of another artefact, saved here before, goes."""
        files = self.data_files()
        for name in self.weights:
            if name in files:
                stored = {key: tensor.detach().cpu() for key, tensor in files[name].items()}
                write_described(folder / name, stored, self.key, self.config)
            else:
                (folder / name).unlink(missing_ok=True)
        write_config(folder, self.config)

    @classmethod
    def read_data(cls: type[Self], paths: dict[str, Path]) -> Self:
        """The artefact of its data files, by name, as far as they are there."""
        raise NotImplementedError

    def generate_model_card(self, *_: object, **card_kwargs: Any) -> ModelCard:
        """The model card, with what is in `self.card` and what is given here."""
        card = {**self.card, **{key: value for key, value in card_kwargs.items() if value is not None}}
        images = [image.name for image in card_images(card)]
        variables = {"version": __version__, **self.card_variables(), **card, "images": images}
        return render(self.template, ModelCardData(license=card.get("license"), **self.card_metadata()), variables)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the data, config.json, README.md and the card's images, each atomically; perhaps push them.

        Returns:
            The address of the commit, if pushed.
        """
        card = {**self.card, **(model_card_kwargs or {})}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_data(folder)
        for image in card_images(card):
            if image.resolve() != (folder / image.name).resolve():
                write(folder / image.name, partial(shutil.copyfile, image))
        write(folder / "README.md", self.generate_model_card(**card).save)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """As `ModelHubMixin.push_to_hub`; nothing but what `save_pretrained` writes is ever uploaded."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        kwargs["allow_patterns"] = [*self.weights, *self.others, "config.json", "README.md", "*.png"]
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
        """The artefact of a folder, or of a repository on the Hub; without a network, as it was last downloaded.

        Args:
            token: to log in to the Hub with.

        Raises:
            ValueError: the kind's own `error`: there is none, or it is damaged. The errors of `huggingface_hub` come
                as they are.
        """
        name = str(pretrained_model_name_or_path)
        try:
            folder = local_folder(
                name,
                [*cls.weights, *cls.others, "config.json"],
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        except HFValidationError as error:
            raise cls.error(str(error)) from error
        paths = {file: folder / file for file in cls.weights if (folder / file).is_file()}
        if not paths:
            raise cls.error(f"{name!r} holds no {cls.weights[0]}: not a {cls.__name__} (pickles are never read).")
        return cls.read_data(paths)


class OneFileArtefact(SharedArtefact):
    """An artefact of one data file, whose config says the `shapes` of its tensors: fp32 on the CPU, by name.

    Raises:
        ValueError: the kind's own `error`: tensors that are not those of the config, or not finite.
    """

    what: ClassVar[str]  # with its article, such as "a gene"

    def __init__(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = finite_tensors(tensors, config.shapes, self.error)
        self.card = {}

    @classmethod
    def read_config(cls, values: Any) -> Any:
        """The config of a description; a ValueError if it is none."""
        raise NotImplementedError

    @classmethod
    def read_data(cls: type[OneFile], paths: dict[str, Path]) -> OneFile:
        with described_file(paths[cls.weights[0]], cls.key, cls.what, cls.error) as (values, file):
            config = cls.read_config(values)
            return cls(config, read_tensors(file, config.shapes))
