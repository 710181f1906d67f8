# SPDX-License-Identifier: Apache-2.0
"""The learngene: one small file from which models of any depth and width are made.

    condense      ancestry model -> learngene, in closed form: seconds, no data; `training.condensing` distils it
    save / push   model.safetensors + config.json + README.md: data only
    descend       learngene -> a descendant of another size: a PeftModel whose weights are generated
                  (save_descendant: a plain one, as a whole folder)
    absorb        a trained descendant -> the learngene that makes it

The file holds the bank of every group once (`methods`), and for every *width* that it was condensed for one set of
size tensors (`layout.Layout`: scalers, biases, norms, embedders), kept at the depth of the ancestry. A depth needs no
tensors of its own: layers are selected by relative depth. (A width does: DiT's fixed sine-cosine position table is
another one at every width, so embedders and scalers of a narrower model cannot be a cut-out of the wider one's; and
the paper's scalers are per target size.) The description of the file is in the metadata of the safetensors file
itself, so that the two cannot disagree; config.json repeats it for readers and for the Hub's download counter.

A learngene of KIND has one size, but can be taken apart by class: `select`, `descend(classes=)`; and it can be taught
new classes: `descend(num_new_classes=)`, then `absorb`.
"""

import copy
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.belongings import TOKENIZER_FILES, Belongings, Source, belongings_of, tokenizer_files
from ..anatomy.companions import Companions
from ..anatomy.dit import LabelInit
from ..anatomy.models import empty_model, model_config, num_labels, prepare_ancestry_, unchanged_random_state
from ..anatomy.scratch import scratch
from ..anatomy.sizes import sizes_of
from ..anatomy.tensors import tensors_of
from ..functional.resize import DepthInit
from ..hub.files import hub_id
from ..hub.shared import SharedArtefact
from ..tuners.base_config import LearngeneConfig, check_integer
from ..tuners.wave import WAVEConfig
from .absorb import absorbed
from .artefact import KEY, WEIGHTS, ArtefactConfig, LearngeneError, read_artefact
from .closed_form import check_ancestry, check_made_of_config, check_unwrapped, closed_form, warn_of_experts
from .descendants import copy_tokenizer, save_model, tokenizer_at_hand
from .generated import add_classes_, generated_model
from .layout import Layout, layout_of, match, resize_bank, resize_tensors, stack, unstack
from .methods import Bank, Start, method_of
from .tailors import add_labels, label_rows, new_tailors, select_classes


__all__ = ["ArtefactConfig", "Learngene", "LearngeneError"]

_logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # the folder beside the file, if it is carried


class Learngene(SharedArtefact):
    """A learngene: `config` and tensors in fp32 on the CPU, "<bank tensor>.<group>" and "sizes.<width>.<layout key>".

    Make one with `condense` or `from_pretrained`. `source` is where its ancestry's tokenizer and the like lie, and
    `tokenizer` a folder with the tokenizer, if it is to be carried in the learngene's own.
    """

    weights, key = (WEIGHTS,), KEY
    others = tuple(f"{TOKENIZER}/{pattern}" for pattern in TOKENIZER_FILES)
    error = LearngeneError
    source: Source | None = None
    tokenizer: Path | None = None

    def __init__(
        self, config: ArtefactConfig, tensors: dict[str, Tensor], layouts: list[Layout] | None = None
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.card = {}
        if layouts is not None:
            self.layouts = layouts

    @classmethod
    def read_data(cls, paths: dict[str, Path]) -> "Learngene":
        learngene = cls(*read_artefact(paths[WEIGHTS]))
        config, carried = learngene.config, paths[WEIGHTS].parent / TOKENIZER
        learngene.source = Source(config.ancestry, config.companions.revision) if config.ancestry else None
        learngene.tokenizer = carried if tokenizer_files(carried) else None
        return learngene

    def write_data(self, folder: Path) -> None:
        super().write_data(folder)
        target = folder / TOKENIZER
        if self.tokenizer is None:
            shutil.rmtree(target, ignore_errors=True)  # of another learngene that was saved here
        else:
            copy_tokenizer(self.belongings, target)

    @property
    def belongings(self) -> Belongings:
        """What belongs to a descendant beside its weights and config."""
        return Belongings(self.config.companions, self.source, self.tokenizer)

    def made_of(
        self, config: ArtefactConfig, tensors: dict[str, Tensor], layouts: list[Layout] | None = None
    ) -> "Learngene":
        """A learngene of other data, of the same ancestry."""
        other = Learngene(config, tensors, layouts)
        other.source, other.tokenizer = self.source, self.tokenizer
        return other

    @property
    def template(self) -> str:
        return self.config.method

    def card_metadata(self) -> dict[str, Any]:
        tags = ["learngene", self.config.method, "safetensors"]
        return {"library_name": "diffusers-learngene", "base_model": self.config.ancestry, "tags": tags}

    def card_variables(self) -> dict[str, Any]:
        config, classes = self.config, self.config.class_tailors or ()
        return {
            "architecture": config.architecture,
            "ancestry": config.ancestry,
            "num_parameters": self.num_parameters,
            "ancestry_parameters": self.ancestry_parameters,
            "base_config": sizes_of(config.base_config),
            "seen_sizes": config.condensed_for,
            "num_classes": len(classes),
            "known_classes": [index for index, units in enumerate(classes) if units is not None],
        }

    @property
    def num_parameters(self) -> int:
        """Numbers in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def ancestry_parameters(self) -> int:
        """Numbers of the ancestry model (tied tensors once)."""
        model = empty_model(self.config.architecture, self.config.base_config)
        return sum(tensor.numel() for tensor in tensors_of(model).values())

    @classmethod
    def condense(
        cls,
        model: nn.Module,
        config: LearngeneConfig | None = None,
        *,
        widths: Sequence[dict] = (),
        start: Start | None = None,
        init_seed: int | None = None,
        seed: int = 0,
        ancestry: str | None = None,
        companions: Any = None,
        revision: str | None = None,
        include_tokenizer: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> "Learngene":
        """Condense an ancestry model in closed form: seconds, no data.

        Unless the bank is large enough to be exact, this is a poor model; it is the *start* of a distillation
        (`training.condensing`), which it shortens.

        Args:
            model: any diffusers / transformers model with repeated blocks. (A DiT's embedders are tied in place.)
            config: the method, sizes of its banks, target modules; always taken as mode="generate". Default: WAVE's.
            widths: config overrides, such as {"num_attention_heads": 2}, of widths that get size tensors of their own.
            start: "layers", from whole layers of the ancestry; "fit", an approximation of all; "random". Default: the
                method's better one (`closed_form`).
            init_seed: where the ancestry was initialised by `initializers.scratch` from a known seed, condense only
                what training added to that. Much closer, but descendants carry the initialisation, frozen and dense.
            seed: of a random start.
            ancestry: Hub id to credit in the card; anything else, such as a folder, is not recorded. Default: that of
                the companions.
            companions: what belongs to the model beside its weights, for `save_descendant`: a folder or Hub id where
                it lies, or an image processor, a tokenizer, a generation config, a pipeline, or several of them.
                Default: where the model was loaded from. The file carries the small ones as data.
            revision: of a Hub id; default: the newest, because a model does not say which one it was loaded from.
            include_tokenizer: carry the tokenizer's files, too, in a folder beside the file. Default: they are taken
                from the ancestry when they are needed.
            inputs: arguments of one call of the model, as small as they may be: of use where a warning says that a
                block cannot be followed (`anatomy.Anatomy`). What they show is recorded for the descendants.

        Raises:
            ValueError: no repeated blocks, no target matched, a template larger than its matrix, a PEFT-wrapped or
                quantised model, NaN in its weights, a width that cannot be, a model that is not its config's,
                companions that belong to no model, or no tokenizer to include.
        """
        check_unwrapped(model)
        architecture, base_config = type(model).__name__, model_config(model)
        anatomy = Anatomy.of(prepare_ancestry_(model), inputs)
        check_ancestry(anatomy)
        warn_of_experts(anatomy)
        belongings = belongings_of(model, companions, revision=revision)
        config = copy.copy(config or WAVEConfig())
        method = method_of(config)
        class_tailors = method.class_tailors(config, num_labels(architecture, base_config))
        sizes, layout, bank, own = closed_form(anatomy, config, start=start, init_seed=init_seed, seed=seed)
        check_made_of_config(anatomy.tensors, tensors_of(empty_model(architecture, base_config)))
        method.check_classes(class_tailors, sizes, num_labels(architecture, base_config))
        tensors = {f"{name}.{key}": value for key, tensors in bank.items() for name, value in tensors.items()}
        tensors |= {f"sizes.0.{key}": value for key, value in own.items()}
        description = ArtefactConfig(
            architecture,
            base_config,
            method.name,
            sizes,
            ancestry=hub_id(ancestry) or hub_id(belongings.source.name if belongings.source else None),
            init_seed=init_seed,
            class_tailors=class_tailors,
            watched_ends={key: [end.added, end.normed] for key, end in anatomy.watched_ends.items()},
            companions=Companions.read(asdict(belongings.small), architecture, base_config),
        )
        learngene = cls(description, {key: value.cpu().contiguous() for key, value in tensors.items()}, [layout])
        learngene.source, learngene.tokenizer = belongings.source, belongings.tokenizer
        if include_tokenizer:
            learngene.tokenizer = tokenizer_at_hand(belongings)
        for overrides in widths:
            learngene._add_width(overrides)
        return learngene

    def _add_width(self, overrides: dict) -> None:
        target = self.layout(self.config.override(overrides))
        if self.width_of(target) is not None:
            return
        resized = resize_tensors(self.size_tensors(0), self.layouts[0], target, self.bank)
        self.tensors |= {f"sizes.{len(self.layouts)}.{key}": value.clone() for key, value in resized.items()}
        self.config.widths.append(dict(overrides))
        self.layouts.append(target)

    @property
    def bank(self) -> dict[str, Bank]:
        """Tensors that layers share, by group and name, at the width of the ancestry."""
        names = self.config.factors.bank_tensors
        return {key: {name: self.tensors[f"{name}.{key}"] for name in names} for key in self.config.bank_sizes}

    def size_tensors(self, width: int) -> dict[str, Tensor]:
        """Size tensors of the width of that index in `config.widths`, by layout key."""
        prefix = f"sizes.{width}."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    @cached_property
    def layouts(self) -> list[Layout]:
        """Layout of every width in `config.widths`, at the depth of the ancestry."""
        return [self.layout(self.config.override(overrides)) for overrides in self.config.widths]

    def layout(self, base_config: dict) -> Layout:
        """Layout of a model of that config."""
        return self.config.layout(base_config)

    def width_of(self, target: Layout) -> int | None:
        """Index of the width whose tensors fit a target layout as they are; None if it has to be resized."""
        return next((index for index, own in enumerate(self.layouts) if match(own, target) is not None), None)

    def seen(self, overrides: dict) -> bool:
        """Whether the size of these config overrides was drawn while distilling."""
        config = self.config.override(overrides)
        return any(self.config.override(size) == config for size in self.config.condensed_for)

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Learngene":
        """The learngene that other tensors make, of the same keys and shapes."""
        return self.made_of(self.config, tensors, self.layouts)

    def tensors_at(self, target: Layout, how: DepthInit = "nearest") -> tuple[dict[str, Tensor], dict[str, Bank]]:
        """Size tensors and bank of a descendant, given its layout; differentiable. For `how` see `descend`.

        "random" draws from torch's global state.
        """
        width = self.width_of(target) or 0
        source = self.layouts[width]
        bank = resize_bank(self.bank, self.layouts[0], source)
        tensors = resize_tensors(self.size_tensors(width), source, target, bank, how)
        return tensors, resize_bank(bank, source, target)

    def origin(self, target: Anatomy) -> dict[str, Tensor] | None:
        """By name, the initial weights to which a descendant of that anatomy adds what is generated; None: zero.

        Those of the ancestry, brought to another size as its trained weights would be.
        """
        if self.config.init_seed is None:
            return None
        skeleton = empty_model(self.config.architecture, self.config.base_config)
        init = Anatomy.of(scratch(skeleton, {}, seed=self.config.init_seed))
        source, plain = layout_of(init), layout_of(target)
        return unstack(resize_tensors(stack(init.tensors, source), source, plain), plain)

    def descend(
        self,
        *,
        sigma_init: DepthInit = "nearest",
        classes: Sequence[int] | None = None,
        num_new_classes: int = 0,
        tailors_per_class: int | None = None,
        label_init: LabelInit = "null",
        seed: int = 0,
        **overrides: object,
    ) -> PeftModel:
        """A descendant of another size, or for other classes, in eval mode: its weights are generated from the bank.

        The bank is frozen; scalers, and biases and norms of the blocks, are trainable (KIND: everything is).
        `merge_and_unload()` gives the plain model (KIND: of a single class).

        Args:
            sigma_init: how the scalers (FINE's sigma) of another depth start, by relative depth: "nearest" is what
                elastic condensing trains, so nothing is left to train; "interpolated" between neighbouring layers;
                "linear", a straight line through all layers; "identical", their mean; "random", of their magnitude.
                (The last three are the paper's ablation, FINE section 2.3; its best is "random", then trained.)
            classes: of KIND: keep only the tailors of these classes, in a smaller model. Ids stay what they are, and
                other labels are refused, except the null class's. []: learngenes only, whatever the label.
            num_new_classes: of KIND: classes to be learnt. Their ids follow the old ones', and the null class's id
                theirs. Their tailors are a second adapter, "novel", of sigma = 0; these and the new label rows alone
                are trainable, whatever the optimiser, so that the old classes stay as they are, bit for bit. `absorb`
                makes one learngene of both.
            tailors_per_class: of new classes, in each group. Default: as many as an old class has.
            label_init: of their label rows, where the model has labels: "null" or "mean" (`dit.new_label_rows`).
            seed: of the new tailors, and of sigma_init="random". The global random state is neither read nor changed.
            overrides: keys of the base model's own config, e.g. num_layers=6, num_attention_heads=8 (diffusers) or
                num_hidden_layers=6, hidden_size=384, num_attention_heads=6 (transformers). None: the ancestry's size,
                which is KIND's only one.

        Raises:
            ValueError: unknown key or `sigma_init`, a size the architecture refuses, a change that is neither depth
                nor width; classes that are not there, or of another method than KIND.

        Warns:
            UserWarning: the learngene was not condensed for this width; train the scalers before use. (A depth that
                was not drawn while distilling is only logged: it works, as depths in between do.)
        """
        config = self.config.override(overrides)
        if self.config.factors.per_layer and sigma_init != "nearest":
            raise ValueError(f"sigma_init={sigma_init!r}: this learngene has one depth, with a sigma of every layer.")
        check_integer("num_new_classes", num_new_classes, least=0)
        if tailors_per_class is not None and not num_new_classes:
            raise ValueError(f"tailors_per_class={tailors_per_class} is of new classes: give num_new_classes.")
        old = self if classes is None else self.select(classes)
        if num_new_classes:
            sizes = new_tailors(self.config, num_new_classes, tailors_per_class)
            rows = label_rows(self.config, self.tensors, num_new_classes, label_init)
            wider = Learngene(*add_labels(old.config, old.tensors, rows, num_new_classes))
            model = wider.descend()
            return add_classes_(model, wider.config, wider.layouts[0], sizes, num_new_classes, seed).eval()
        if classes is not None:
            return old.descend()
        anatomy = self.config.skeleton(config)
        layout = self.config.layout_of(anatomy)
        with unchanged_random_state():
            torch.manual_seed(seed)
            tensors, bank = self.tensors_at(layout, sigma_init)
        if self.width_of(layout) is None:
            warnings.warn(
                f"this learngene holds no scalers for the width of {overrides}: they are resized from the ancestry's, "
                f"which is a start for training, not a finished model. Its widths: {self.config.widths}.",
                stacklevel=2,
            )
        elif self.config.condensed_for and not self.seen(overrides):
            _logger.warning(
                "%s is none of the sizes that this learngene was condensed for: %s",
                overrides,
                self.config.condensed_for,
            )
        with unchanged_random_state():
            return generated_model(self.config, anatomy, layout, tensors, bank, self.origin(anatomy)).eval()

    def save_descendant(self, folder: str | Path, **overrides: Any) -> None:
        """Write a plain descendant as a whole folder, which loads as its ancestry's did: weights and config, and what
        belongs to them (`descendants`): generation config, labels, preprocessing, tokenizer, pipeline.

        Tokenizers, and the other parts of a pipeline, are copied from where they lie, the ancestry's repository on the
        Hub or the folder that was condensed from; where they cannot be reached, that is logged.

        Args:
            overrides: as `descend` takes them.

        Raises:
            ValueError: as `descend`.
            RuntimeError: a descendant of several classes of KIND, which is no plain model.
        """
        save_model(self.descend(**overrides).merge_and_unload(), folder, self.belongings)

    def select(self, classes: Sequence[int]) -> "Learngene":
        """The smaller learngene of these classes only, ids as they are. (KIND's.)

        Raises:
            ValueError: a class twice, one that is not there or not known, or a learngene of another method.
        """
        return self.made_of(*select_classes(self.config, self.tensors, self.layouts[0], classes))

    def absorb(self, model: nn.Module) -> "Learngene":
        """The learngene that makes a descendant of this one as it is now, after training: a new one, to be saved.

        New classes (`descend(num_new_classes=)`) become classes like the others: their tailors stand among the old
        ones, in the same banks.

        Args:
            model: what `descend` made of the ancestry's size, with whatever classes; wrapped by PEFT or not.

        Raises:
            ValueError: the model is another one.
        """
        return self.made_of(*absorbed(self.config, model))
