# SPDX-License-Identifier: Apache-2.0
"""The learngene: one small file from which models of any depth and width are made.

    condense      ancestry model -> learngene, in closed form (seconds, no data); `training.condensing` distils it further
    save / push   model.safetensors + config.json + README.md: data only
    descend       learngene -> a descendant of another size: a PeftModel whose weights are generated

The file holds the templates of every group once, and for every *width* that it was condensed for one set of size tensors
(`layout.Layout`: scalers, biases, norms, embedders), kept at the depth of the ancestry. A depth needs no tensors of its
own: layers are selected by relative depth. (A width does: DiT's fixed sine-cosine position table is another one at every
width, so embedders and scalers of a narrower model cannot be a cut-out of the wider one's; and the paper's scalers are
per target size.) The description of the file is in the metadata of the safetensors file itself, so that the two cannot
disagree; config.json repeats it for readers and for the Hub's download counter.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .closed_form import closed_form
from .functional import wave
from .layout import Layout, layout_of, resize_tensors
from .models import check_config, empty_model, model_config, override_config, prepare_ancestry_, tensors_of
from .tuners.wave import WAVEConfig


WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1


class LearngeneError(ValueError):
    """A learngene file or folder that is incomplete, damaged, or not a learngene; the message names what is wrong."""


@dataclass
class LearngeneConfig:
    """What a learngene file says about itself.

    Attributes:
        architecture: class name of the model in diffusers or transformers.
        base_config: config of the ancestry model.
        template_pattern: [N, w1, w2] of every group's templates.
        widths: config overrides of every width that has its own size tensors; the first is {} (the ancestry's).
        condensed_for: config overrides of every size that was drawn while distilling; empty after the closed form.
        ancestry: Hub id of the ancestry model, if it has one.
        method: "wave".
        format_version: of this file layout.
    """

    architecture: str
    base_config: dict
    template_pattern: dict[str, list[int]]
    widths: list[dict] = field(default_factory=lambda: [{}])
    condensed_for: list[dict] = field(default_factory=list)
    ancestry: str | None = None
    method: str = "wave"
    format_version: int = FORMAT_VERSION


class Learngene(
    ModelHubMixin, library_name="diffusers-learngene", tags=["learngene", "safetensors"], license="apache-2.0"
):
    """A learngene: `config` and the tensors, "templates.<group>" and "sizes.<width>.<layout key>".

    Make one with `condense` or `from_pretrained`.
    """

    def __init__(self, config: LearngeneConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self.card: dict = {}

    # ------------------------------------------------------------------------------------------------ condense

    @classmethod
    def condense(
        cls,
        model: nn.Module,
        config: WAVEConfig | None = None,
        *,
        widths: Sequence[dict] = (),
        whole_layers: bool = True,
        ancestry: str | None = None,
    ) -> "Learngene":
        """Condense an ancestry model in closed form: seconds, no data.

        Unless there are templates enough to be exact, this is a poor model; it is the *start* of a distillation
        (`training.condensing`), which it shortens.

        Args:
            model: any diffusers / transformers model with repeated blocks.
            config: templates' size and number, target modules; default WAVEConfig(mode="generate").
            widths: config overrides, such as {"num_attention_heads": 2}, of widths that get size tensors of their own.
            whole_layers: start from whole layers of the ancestry; False: from the truncated SVD (see `closed_form`).
            ancestry: Hub id to credit in the card.

        Raises:
            ValueError: no repeated blocks, no target matched, a template larger than its matrix, a PEFT-wrapped model.
        """
        config = config or WAVEConfig(mode="generate")
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError("model carries PEFT layers: call merge_and_unload() or unload() on it first.")
        prepare_ancestry_(model)
        pattern, templates, own = closed_form(model, config, whole_layers=whole_layers)
        tensors = {f"templates.{key}": value for key, value in templates.items()}
        tensors |= {f"sizes.0.{key}": value for key, value in own.items()}
        description = LearngeneConfig(type(model).__name__, model_config(model), pattern, ancestry=ancestry)
        learngene = cls(description, tensors)
        for overrides in widths:
            learngene._add_width(overrides)
        return learngene

    def _add_width(self, overrides: dict) -> None:
        config = override_config(self.config.architecture, self.config.base_config, overrides)
        target = self.layout(config)
        resized = resize_tensors(self.size_tensors(0), self.layouts[0], target, self.templates)
        self.tensors |= {f"sizes.{len(self.config.widths)}.{key}": value.clone() for key, value in resized.items()}
        self.config.widths.append(dict(overrides))
        self.__dict__.pop("layouts", None)

    # ------------------------------------------------------------------------------------------------- contents

    @property
    def templates(self) -> dict[str, Tensor]:
        """Templates (N, w1, w2) by group key."""
        return {key.removeprefix("templates."): t for key, t in self.tensors.items() if key.startswith("templates.")}

    def size_tensors(self, width: int) -> dict[str, Tensor]:
        """Size tensors of the width of that index in `config.widths`, by layout key."""
        prefix = f"sizes.{width}."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    @cached_property
    def layouts(self) -> list[Layout]:
        """Layout of every width in `config.widths`, at the depth of the ancestry."""
        configs = (override_config(self.config.architecture, self.config.base_config, w) for w in self.config.widths)
        return [self.layout(config) for config in configs]

    def layout(self, base_config: dict) -> Layout:
        return layout_of(empty_model(self.config.architecture, base_config), list(self.config.template_pattern))

    def width_of(self, target: Layout) -> int | None:
        """Index of the width whose tensors fit a target layout as they are; None if it has to be resized."""
        shapes = {key.partition("#")[0]: set() for key in target.entries}
        for key, entry in target.entries.items():
            shapes[key.partition("#")[0]].add(entry.shape)
        for index, layout in enumerate(self.layouts):
            own = {(key.partition("#")[0], entry.shape) for key, entry in layout.entries.items()}
            if all((key, shape) in own for key, options in shapes.items() for shape in options):
                return index
        return None

    @property
    def num_parameters(self) -> int:
        """Numbers in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def ancestry_parameters(self) -> int:
        """Numbers of the ancestry model (tied tensors once)."""
        model = empty_model(self.config.architecture, self.config.base_config)
        return sum(tensor.numel() for tensor in tensors_of(model).values())

    # -------------------------------------------------------------------------------------------------- descend

    def size_state(self, overrides: dict) -> tuple[dict, Layout, dict[str, Tensor]]:
        """Config, layout and size tensors of the descendant with these config overrides; differentiable."""
        config = override_config(self.config.architecture, self.config.base_config, overrides)
        target = self.layout(config)
        width = self.width_of(target)
        source = 0 if width is None else width
        tensors = resize_tensors(self.size_tensors(source), self.layouts[source], target, self.templates)
        return config, target, tensors

    def descend(self, **overrides: object) -> PeftModel:
        """A descendant of another size, ready to use: its weights are generated from the templates.

        Templates are frozen; scalers, biases and norms are trainable. `merge_and_unload()` gives the plain model.

        Args:
            overrides: keys of the base model's own config, e.g. num_layers=6, num_attention_heads=8 (diffusers) or
                num_hidden_layers=6, hidden_size=384, num_attention_heads=6 (transformers). None: the ancestry's size.

        Raises:
            ValueError: unknown key, a size the architecture refuses, or a change that is neither depth nor width.

        Warns:
            UserWarning: the learngene was not condensed for this width; train the scalers before use.
        """
        config, layout, tensors = self.size_state(dict(overrides))
        if self.width_of(layout) is None:
            warnings.warn(
                f"this learngene holds no scalers for the width of {overrides}: they are resized from the ancestry's, "
                f"which is a start for training, not a finished model. Its widths: {self.config.widths}.",
                stacklevel=2,
            )
        return generated_model(self.config.architecture, config, self.config.template_pattern, layout, tensors, self.templates)

    # --------------------------------------------------------------------------------------------------- the file

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Write model.safetensors, config.json and README.md, each atomically: a crash leaves the old file or the new."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        description = json.dumps(asdict(self.config))
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.tensors.items()}
        _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt", "learngene": description}))
        _write(folder / "config.json", lambda path: Path(path).write_text(json.dumps(asdict(self.config), indent=2)))
        _write(folder / "README.md", lambda path: self.generate_model_card().save(path))

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, token, local_files_only=False, **_: object
    ) -> "Learngene":
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(model_id),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=[WEIGHTS, "config.json"],
                )
            )
        if not (folder / WEIGHTS).is_file():
            raise LearngeneError(f"{model_id!r} holds no {WEIGHTS}: not a learngene (pickled weights are never read).")
        return cls._read(folder / WEIGHTS)

    @classmethod
    def _read(cls, path: Path) -> "Learngene":
        try:
            with safe_open(path, framework="pt") as file:
                description = (file.metadata() or {}).get("learngene")
                if description is None:
                    raise LearngeneError(f"{path} is a safetensors file, but not a learngene (no description in it).")
                config = _parse_config(description)
                learngene = cls(config, {})
                _check_shapes(learngene._expected_shapes(), {key: file.get_slice(key).get_shape() for key in file.keys()})
                learngene.tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise LearngeneError(f"{path} cannot be read as safetensors ({error}): download or copy it again.") from error
        for key, tensor in learngene.tensors.items():
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise LearngeneError(f"tensor {key!r} of {path} is not finite floating point ({tensor.dtype}).")
        return learngene

    def _expected_shapes(self) -> dict[str, list[int]]:
        pattern = self.config.template_pattern
        shapes = {f"templates.{key}": list(shape) for key, shape in pattern.items()}
        for index, layout in enumerate(self.layouts):
            for key, entry in layout.entries.items():
                shape = list(entry.shape)
                if entry.group:
                    shape = [pattern[entry.group][0], *wave.grid(shape, pattern[entry.group][1:])]
                lead = [] if key.startswith("shared.") else [len(entry.names)]
                shapes[f"sizes.{index}.{key}"] = lead + shape
        return shapes

    def generate_model_card(self, *_: object, **card_kwargs: object) -> ModelCard:
        """The model card from hub_cards/<method>.md; set `self.card` to add results, images, training, license, repo_id."""
        card = {**self.card, **{key: value for key, value in card_kwargs.items() if value is not None}}
        data = ModelCardData(
            library_name="diffusers-learngene",
            license=card.pop("license", None) or "apache-2.0",
            base_model=self.config.ancestry,
            tags=["learngene", self.config.method, "safetensors"],
        )
        template = (files("diffusers_learngene.hub_cards") / f"{self.config.method}.md").read_text()
        return ModelCard.from_template(
            data,
            template_str=template,
            method=self.config.method.upper(),
            architecture=self.config.architecture,
            ancestry=self.config.ancestry,
            num_parameters=self.num_parameters,
            ancestry_parameters=self.ancestry_parameters,
            seen_sizes=self.config.condensed_for,
            base_config=self.config.base_config,
            version=version("diffusers-learngene"),
            **card,
        )


def generated_model(
    architecture: str,
    config: dict,
    template_pattern: dict[str, list[int]],
    layout: Layout,
    tensors: dict[str, Tensor],
    templates: dict[str, Tensor],
) -> PeftModel:
    """A PeftModel (mode="generate") with these tensors; nothing dense is ever allocated for the factored matrices."""
    model = empty_model(architecture, config)
    targets = [name.rpartition(".")[0] for entry in layout.entries.values() if entry.group for name in entry.names.values()]
    adapter = WAVEConfig(mode="generate", target_modules=targets, template_pattern=template_pattern)
    peft_model = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    owners = {group: next(iter(e.names.values())) for e in reversed(layout.entries.values()) if (group := e.group)}
    state = {
        f"{name.removesuffix('.weight')}.learngene_wave_bank.default.templates": templates[group].clone()
        for group, name in owners.items()
    }
    trainable = set()
    for key, entry in layout.entries.items():
        slices = [tensors[key]] if key.startswith("shared.") else tensors[key].unbind()
        for name, tensor in zip(entry.names.values(), slices, strict=True):
            module_path, _, attribute = name.rpartition(".")
            if entry.group:
                state[f"{module_path}.base_layer.weight"] = torch.empty(0)  # dropped, but no longer a meta tensor
                name = f"{module_path}.learngene_wave_scaler.default.weight"
            elif hasattr(model.get_submodule(module_path), "base_layer"):
                name = f"{module_path}.base_layer.{attribute}"
            state[name] = tensor.detach().clone()
            if entry.group or (tensor.ndim == 1 and not key.startswith("shared.")):
                trainable.add(name)
    model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return peft_model


def _write(path: Path, save) -> None:
    """Write through a temporary file in the same folder and rename it into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _parse_config(description: str) -> LearngeneConfig:
    """Check a description read from a file: exact keys, types, and nothing that could run code."""
    try:
        values = json.loads(description)
        config = LearngeneConfig(**values)
    except (TypeError, ValueError) as error:
        raise LearngeneError(f"the learngene's description is damaged: {error}") from error
    if config.format_version != FORMAT_VERSION:
        raise LearngeneError(f"format_version={config.format_version!r} is not {FORMAT_VERSION}: update diffusers-learngene.")
    if config.method != "wave":
        raise LearngeneError(f"method={config.method!r} is not known: update diffusers-learngene.")
    check_config(config.base_config)
    for key, shape in config.template_pattern.items():
        if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and 0 < n < 2**20 for n in shape)):
            raise LearngeneError(f"template_pattern[{key!r}]={shape!r} must be three positive integers [N, w1, w2].")
    return config


def _check_shapes(expected: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise LearngeneError(f"the file lacks {missing[:3]} and has unknown {extra[:3]} ({len(missing)} and {len(extra)} in all).")
    for key, shape in expected.items():
        if found[key] != shape:
            raise LearngeneError(f"tensor {key!r} has shape {found[key]}, but the learngene's config asks for {shape}.")
