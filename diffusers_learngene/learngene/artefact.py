# SPDX-License-Identifier: Apache-2.0
"""The file of a learngene, safetensors with a description in its metadata: written atomically, read with suspicion.

Whatever lies in a file, reading it ends in a learngene that fits its own description or in a `LearngeneError`. Types,
ranges, keys and shapes are checked in the file's header, before a tensor is read or a model of such a config is built.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, End
from ..anatomy.companions import Companions
from ..anatomy.models import check_config, empty_model, num_labels
from ..anatomy.sizes import override_config
from ..hub.descriptions import described_file, exact_fields
from ..hub.files import HUB_ID
from ..tuners.base_config import check_integer
from ..tuners.kind.classes import ClassTailors
from .layout import Layout, layout_of, parse_group_key
from .methods import METHODS, Method


WEIGHTS, KEY = "model.safetensors", "learngene"
FORMAT_VERSION = 1

_DTYPES = ("F32", "F16", "BF16")
_FEW_BLOCKS = 256  # a config may ask for so many although the file has fewer: another tower, a count of something else


class LearngeneError(ValueError):
    """A learngene file or folder that is incomplete, damaged, or not a learngene; the message names what is wrong."""


@dataclass
class ArtefactConfig:
    """What a learngene file says about itself.

    Attributes:
        architecture: class name of the model in diffusers or transformers.
        base_config: config of the ancestry model.
        method: "wave", "fine" or "kind".
        bank_sizes: size of every group's bank, as the method has it (`methods`): WAVE [N, w1, w2], FINE [r], KIND
            [num_learngene, num_tailors] of every layer.
        widths: config overrides of every width that has its own size tensors; the first is {} (the ancestry's).
        condensed_for: config overrides of every size that was drawn while distilling; empty after the closed form.
        ancestry: Hub id of the ancestry model, if it has one.
        init_seed: seed from which the ancestry was initialised, if the bank makes only what training added to that.
        class_tailors: of KIND, by class, the tailors that it opens (`classes`); None of the other methods.
        watched_ends: what ends residual branches where only a real call of the ancestry has shown it, by stack and
            path in a block: [what is added, whether a norm follows], as `anatomy.End` has them.
        companions: JSON that belongs to a descendant; files of before it was recorded have none.
        format_version: of this file layout.
    """

    architecture: str
    base_config: dict[str, Any]
    method: str
    bank_sizes: dict[str, list[int]]
    widths: list[dict] = field(default_factory=lambda: [{}])
    condensed_for: list[dict] = field(default_factory=list)
    ancestry: str | None = None
    init_seed: int | None = None
    class_tailors: ClassTailors | None = None
    watched_ends: dict[str, list] = field(default_factory=dict)
    companions: Companions = field(default_factory=Companions)
    format_version: int = FORMAT_VERSION

    @property
    def factors(self) -> Method:
        """What the method makes of banks and scalers."""
        return METHODS[self.method]

    def override(self, overrides: dict) -> dict[str, Any]:
        """Config of the model of another size.

        Raises:
            ValueError: there is no such model, or this learngene makes none of another size.
        """
        config = override_config(self.architecture, self.base_config, overrides)
        if self.factors.per_layer and config != self.base_config:
            raise ValueError(
                f"{overrides} would change the size, but layers share nothing in {self.method.upper()}, so that a "
                "learngene of it has the size of its ancestry. (WAVE's and FINE's have any.)"
            )
        return config

    def skeleton(self, base_config: dict) -> Anatomy:
        """The anatomy of an empty model of that config (`anatomy.models.empty_model`).

        Raises:
            ValueError: the config makes no such model, or one without blocks that share.
        """
        known_ends = {key: End(*value) for key, value in self.watched_ends.items()}
        anatomy = Anatomy.of(empty_model(self.architecture, base_config), known_ends=known_ends)
        modules = dict(anatomy.model.named_modules())
        for stack in {parse_group_key(key)[0] for key in self.bank_sizes} & modules.keys() - {"", *anatomy.stacks}:
            raise ValueError(f"{stack!r} would have fewer than two blocks that share: the least depth is 2.")
        return anatomy

    def layout_of(self, anatomy: Anatomy) -> Layout:
        """Where the tensors of a model of this architecture lie."""
        return layout_of(anatomy, self.bank_sizes, self.factors)

    def layout(self, base_config: dict) -> Layout:
        """Where the tensors of a model of that config lie; errors as `skeleton`. Not to be changed: it is kept."""
        parts = (self.architecture, base_config, self.method, self.bank_sizes, self.watched_ends)
        return _layout(*(json.dumps(part) for part in parts))

    def shapes(self, layouts: list[Layout]) -> dict[str, list[int]]:
        """Shape of every tensor of the learngene, given the layout of every width."""
        shapes: dict[str, list[int]] = {}
        for key, size in self.bank_sizes.items():
            parts = layouts[0].parts(key)
            bank = self.factors.bank_shapes(size, [part.shape for part in parts])
            lead = [len(parts[0].names)] if self.factors.per_layer else []
            shapes |= {f"{name}.{key}": [*lead, *shape] for name, shape in bank.items()}
        for index, layout in enumerate(layouts):
            for key, entry in layout.entries.items():
                if layout.owns(key):
                    shape = entry.shape
                    if entry.group:
                        shape = self.factors.scaler_shape(self.bank_sizes[entry.group], shape)
                    lead = [] if key.startswith("shared.") else [len(entry.names)]
                    shapes[f"sizes.{index}.{key}"] = [*lead, *shape]
        return shapes


@lru_cache(maxsize=64)
def _layout(*parts: str) -> Layout:
    """`ArtefactConfig.layout`, of the same config once: a run asks for those of its sizes again and again."""
    architecture, base_config, method, bank_sizes, watched_ends = map(json.loads, parts)
    config = ArtefactConfig(architecture, base_config, method, bank_sizes, watched_ends=watched_ends)
    return config.layout_of(config.skeleton(base_config))


def read_artefact(path: Path) -> tuple[ArtefactConfig, dict[str, Tensor], list[Layout]]:
    """Config and fp32 tensors of a learngene file, and the layout of each of its widths.

    Raises:
        LearngeneError: the file is anything else.
    """
    with described_file(path, KEY, "a learngene", LearngeneError) as (values, file):
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {key: list(part.get_shape()) for key, part in slices.items()}
        config = _config_of(values, shapes)
        layouts = [config.layout(config.override(overrides)) for overrides in config.widths]
        _check_shapes(config, layouts, shapes)
        for key, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise LearngeneError(f"tensor {key!r} is {part.get_dtype()}, not one of {', '.join(_DTYPES)}.")
        tensors = {key: file.get_tensor(key).float() for key in shapes}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LearngeneError(f"tensor {key!r} of {path} holds NaN or infinity.")
    return config, tensors, layouts


def _config_of(values: Any, shapes: Mapping[str, list[int]]) -> ArtefactConfig:
    """Check everything in a description that can be checked without building a model."""
    if not isinstance(values, dict):
        raise LearngeneError(f"its description is a {type(values).__name__}.")
    for name, known in (("format_version", (FORMAT_VERSION,)), ("method", tuple(METHODS))):
        value = values.get(name)
        if type(value) is not type(known[0]) or value not in known:
            raise LearngeneError(f"{name}={value!r} is none of {known}: update diffusers-learngene.")
    values = exact_fields(ArtefactConfig, {"companions": asdict(Companions()), "watched_ends": {}, **values})
    kinds = {"architecture": str, "base_config": dict, "bank_sizes": dict, "widths": list, "condensed_for": list}
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise LearngeneError(f"{name}={values[name]!r} must be a {kind.__name__}.")
    config = ArtefactConfig(**values)
    config.companions = Companions.read(values["companions"], config.architecture, config.base_config)

    if config.ancestry is not None and not (isinstance(config.ancestry, str) and HUB_ID.fullmatch(config.ancestry)):
        raise LearngeneError(f"ancestry={config.ancestry!r} must be a Hub id or null.")
    if config.init_seed is not None:
        check_integer("init_seed", config.init_seed, least=0, most=2**63 - 1)
    if not isinstance(config.watched_ends, dict) or not all(map(_is_end, config.watched_ends.values())):
        raise LearngeneError(f"watched_ends={config.watched_ends!r} must map names to [a number, true or false].")
    for key, size in config.bank_sizes.items():
        config.factors.check_size(f"bank_sizes[{key!r}]", size)
    labels = num_labels(config.architecture, config.base_config)
    config.factors.check_classes(config.class_tailors, config.bank_sizes, labels)

    stored = {key.split(".")[1] for key in shapes if key.startswith("sizes.")}
    if not config.widths or config.widths[0] != {} or stored != set(map(str, range(len(config.widths)))):
        raise LearngeneError(
            f"widths={config.widths[:3]!r} must begin with {{}}, and the file has sizes {sorted(stored)}."
        )
    depth = max((s[0] for key, s in shapes.items() if s and re.match(r"sizes\.0\.(scalers|layers)\.", key)), default=0)
    most = max(depth, _FEW_BLOCKS)
    check_config(config.base_config, most=most)
    for name in ("widths", "condensed_for"):
        for overrides in getattr(config, name):
            if not isinstance(overrides, dict):
                raise LearngeneError(f"{name}: {overrides!r} must be config overrides.")
            check_config(config.override(overrides), most=most)
    return config


def _is_end(value: Any) -> bool:
    """Whether a value of `watched_ends` is one."""
    return isinstance(value, list) and [type(part) for part in value] == [float, bool] and value[0] in (0.0, 1.0)


def _check_shapes(config: ArtefactConfig, layouts: list[Layout], found: Mapping[str, list[int]]) -> None:
    """Compare the tensors of a file with those of the models that its config describes."""
    for layout in layouts:
        if unused := set(config.bank_sizes) - {entry.group for entry in layout.entries.values()}:
            raise LearngeneError(f"bank_sizes names {sorted(unused)}, which {config.architecture} has not.")
    expected = config.shapes(layouts)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        number = f"{len(missing)} and {len(extra)} in all"
        raise LearngeneError(f"the file lacks the tensors {missing[:3]} and has unknown ones {extra[:3]} ({number}).")
    for key, shape in expected.items():
        if found[key] != shape:
            raise LearngeneError(f"tensor {key!r} has the shape {found[key]}, but its config asks for {shape}.")
