# SPDX-License-Identifier: Apache-2.0
"""What diffusers' `DiTTransformer2DModel` leaves out, in one place.

The class is the one that `DiTPipeline` and the Hub load, so we keep it; but it was written for inference with
converted weights, and training it as it stands goes wrong in five quiet ways:

1. every block owns a copy of the timestep and label embedders, which drift apart in training
   -> `tie_dit_embedders_`: one embedder, while files keep the stock layout;
2. every block draws its own label dropout, so that a label is dropped in some blocks only, which breaks guidance
   -> `disable_label_dropout_` and, once per sample in the loss, `drop_labels`;
3. there is no DiT initialisation (adaLN-Zero) -> `init_dit_weights_`;
4. the timestep frequencies are not those of the original code -> `set_frequency_shift_`;
5. the sizes of the paper have no names -> `DIT_SIZES`.

`create_dit` puts 1, 2, 3 and 5 together. And new classes want label rows of their own, while the old ones stay:
`new_label_rows`, `train_label_rows_`, and `join_label_rows_` when all is done.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from diffusers.models.embeddings import LabelEmbedding, Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn
from torch.nn.utils import parametrize


__all__ = [
    "DIT_SIZES",
    "LABEL_ROWS",
    "create_dit",
    "disable_label_dropout_",
    "drop_labels",
    "init_dit_weights_",
    "join_label_rows_",
    "label_table",
    "new_label_rows",
    "set_frequency_shift_",
    "tie_dit_embedders_",
    "train_label_rows_",
]

LABEL_ROWS = "parametrizations.weight.0.rows"  # of a table: the parameter that `train_label_rows_` makes

Model = TypeVar("Model", bound=nn.Module)
LabelInit = Literal["null", "mean"]

# Table 1 of https://huggingface.co/papers/2212.09748, with patches of 2 x 2.
DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 2},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64, "patch_size": 2},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2},
}


def create_dit(
    size: str | None = None, *, generator: torch.Generator | None = None, **config: Any
) -> DiTTransformer2DModel:
    """A new DiT, ready to be trained: DiT's initialisation, one embedder for all blocks, no dropout of its own.

    Args:
        size: A name of `DIT_SIZES`; `None` leaves everything to `config`.
        generator: Draws the weights; the same seed gives the same model. `None`: torch's global generator.
        config: `DiTTransformer2DModel`'s own config keys; they win over those of `size`.

    Raises:
        ValueError: For an unknown size or an unknown config key.
    """
    if size is not None and size not in DIT_SIZES:
        raise ValueError(
            f"size={size!r} is not one of {sorted(DIT_SIZES)}; leave it out and give num_layers, ... instead."
        )
    known = set(inspect.signature(DiTTransformer2DModel.__init__).parameters) - {"self"}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"config={unknown} are not config keys of DiTTransformer2DModel, which has {sorted(known)}.")
    with torch.random.fork_rng(devices=[]):  # the stock initialisation is thrown away: it must not cost random numbers
        model = DiTTransformer2DModel(**{**DIT_SIZES.get(size or "", {}), **config})
    init_dit_weights_(model, generator)
    return disable_label_dropout_(tie_dit_embedders_(model))


@torch.no_grad()
def init_dit_weights_(model: DiTTransformer2DModel, generator: torch.Generator | None = None) -> DiTTransformer2DModel:
    """Initialise in place as the DiT paper does, so that every block starts as the identity and the output as zero.

    Linear layers and the patch projection: xavier uniform, zero biases, where q, k and v count as the one matrix
    (3D, D) that they are in the original code. Embedders: normal, 0.02, the same in every block. adaLN layers and
    the last layer: zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fused = name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v"))
            fan_out, fan_in = module.weight.flatten(1).shape
            bound = math.sqrt(6 / (fan_in + (3 if fused else 1) * fan_out))
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    first = model.transformer_blocks[0].norm1.emb
    nn.init.normal_(first.class_embedder.embedding_table.weight, std=0.02, generator=generator)
    nn.init.normal_(first.timestep_embedder.linear_1.weight, std=0.02, generator=generator)
    nn.init.normal_(first.timestep_embedder.linear_2.weight, std=0.02, generator=generator)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())

    for linear in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def tie_dit_embedders_(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Let all blocks share block 0's timestep and label embedder, in place.

    The function computed stays the same, and there is one embedder to train (DiT-XL: 78 M parameters fewer).
    `state_dict()` and `save_pretrained` go on writing a copy for every block, so the files are stock files;
    after `from_pretrained`, call this again.

    Raises:
        ValueError: When the copies differ, because tying them would change what the model computes: now, or when such
            weights are loaded later.
    """
    blocks = model.transformer_blocks
    if all(block.norm1.emb is blocks[0].norm1.emb for block in blocks):
        return model
    _check_copies(model, model.state_dict(), "")
    for block in blocks[1:]:
        block.norm1.emb = blocks[0].norm1.emb
    # Module-level functions, not closures: they survive deepcopy and pickle.
    model.register_state_dict_post_hook(_write_copies)
    model.register_load_state_dict_pre_hook(_check_copies)
    return model


def _copies(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    """The keys of `state_dict` that hold an embedder's tensor of a block after the first, each with block 0's key."""
    blocks = f"{prefix}transformer_blocks."
    names = model.get_submodule("transformer_blocks.0.norm1.emb").state_dict()
    depth = len(model.get_submodule("transformer_blocks"))  # type: ignore[arg-type]
    pairs = [
        (f"{blocks}{i}.norm1.emb.{name}", f"{blocks}0.norm1.emb.{name}") for i in range(1, depth) for name in names
    ]
    pairs = [(copy, first) for copy, first in pairs if copy in state_dict and first in state_dict]
    # An empty model has nothing to differ.
    return [(copy, first) for copy, first in pairs if not state_dict[copy].is_meta]


def _write_copies(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: give each block its own copy, since safetensors refuses tensors that share memory."""
    for copy, _ in _copies(model, state_dict, prefix):
        if not isinstance(state_dict[copy], nn.Parameter):  # with keep_vars=True the caller wants the parameter itself
            state_dict[copy] = state_dict[copy].clone()


def _check_copies(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise where a block's embedder is not block 0's."""
    pairs = _copies(model, state_dict, prefix)
    differing = [(copy, first) for copy, first in pairs if not torch.equal(state_dict[copy], state_dict[first])]
    if not differing:
        return
    distance = {
        copy: (state_dict[copy].float() - state_dict[first].float()).abs().max().item() for copy, first in differing
    }
    worst = max(distance, key=lambda copy: distance[copy])
    raise ValueError(
        f"model: the embedders of its blocks differ, by up to {distance[worst]:.3g} in {worst}, so that tying them "
        "would change what the model computes. It was trained with the stock class; keep it untied, or copy block 0's "
        "embedder into every block (block.norm1.emb.load_state_dict(...)) and accept another function."
    )


def set_frequency_shift_(model: Model, shift: int) -> Model:
    """Choose the frequencies exp(-ln(10000) i / (128 - shift)) of every timestep embedding in `model`, in place.

    diffusers computes with `shift=1` and facebookresearch/DiT with `shift=0`. Keep 1 for a model trained in diffusers
    and for one that must work in a stock `DiTPipeline`. Take 0 to reproduce the original code with its converted
    weights (facebook/DiT-XL-2-256) exactly, or to go on training them as they were trained. No config field records
    the choice: call this after each `from_pretrained`.
    """
    if shift not in (0, 1):
        raise ValueError(f"shift={shift!r} must be 1 (diffusers) or 0 (facebookresearch/DiT).")
    for module in model.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = shift
    return model


def disable_label_dropout_(model: Model) -> Model:
    """Switch off the stock label dropout, which every block draws anew, in place; `drop_labels` replaces it."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model


def drop_labels(
    labels: torch.Tensor, probability: float, num_classes: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace each label by the null class `num_classes` with `probability`: one draw per sample, for all blocks.

    Args:
        labels: (N,), whole numbers.
        generator: Of any device; the draws are made on its device and moved to that of `labels`.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie between 0 and 1.")
    device = labels.device if generator is None else generator.device
    draws = torch.rand(labels.shape, generator=generator, device=device).to(labels.device)  # (N,)
    return torch.where(draws < probability, num_classes, labels)


def label_table(model: nn.Module) -> str | None:
    """Name of the (first) table of label rows of a model; None if it has no labels."""
    names = (name for name, module in model.named_modules() if isinstance(module, LabelEmbedding))
    return next((f"{name}.embedding_table" for name in names), None)


def new_label_rows(table: torch.Tensor, count: int, how: LabelInit, classes: Sequence[int]) -> torch.Tensor:
    """A table of label rows (C + 1, D) with `count` new classes before the null class, its last row.

    Args:
        how: "null", where a new class starts as the model without a class, which it was trained as (label dropout);
            "mean", of the rows of `classes`, where it starts in their midst.

    Raises:
        ValueError: another `how`, or the mean of no classes.
    """
    if how not in get_args(LabelInit) or (how == "mean" and not classes):
        raise ValueError(f"label_init={how!r} must be one of {get_args(LabelInit)}, and the mean one of some classes.")
    row = table[-1] if how == "null" else table[list(classes)].mean(0)
    return torch.cat([table[:-1], row.expand(count, -1), table[-1:]])


class _TrainedRows(nn.Module):
    """A parametrization: some rows are parameters, in place of those of the frozen table that lies below."""

    def __init__(self, rows: torch.Tensor, start: int) -> None:
        super().__init__()
        self.rows, self.start = nn.Parameter(rows), start

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return torch.cat([table[: self.start], self.rows, table[self.start + len(self.rows) :]])


def train_label_rows_(model: Model, start: int, count: int) -> Model:
    """Train only these label rows from now on, in place; no optimiser touches the others, weight decay included.

    Their parameter is `LABEL_ROWS` of the table. (Masked gradients would not do: weight decay moves what they mask.)
    """
    table = label_table(model)
    if table is not None:
        embedding = model.get_submodule(table)
        embedding.weight.requires_grad_(False)  # type: ignore[operator, union-attr]
        rows = embedding.weight.detach()[start : start + count].clone()  # type: ignore[operator, union-attr, index]
        parametrize.register_parametrization(embedding, "weight", _TrainedRows(rows, start))
    return model


def join_label_rows_(model: Model) -> Model:
    """Undo `train_label_rows_` in place, keeping what was trained: a stock model again, which can be saved as one."""
    table = label_table(model)
    if table is not None and parametrize.is_parametrized(model.get_submodule(table), "weight"):
        parametrize.remove_parametrizations(model.get_submodule(table), "weight")
    return model
