# SPDX-License-Identifier: Apache-2.0
"""An ancestry model's tensors -> bank and size tensors, in closed form: the start of condensing.

fit       an approximation of the weights: WAVE's least-squares fit is a truncated SVD over tiles; FINE's components
          are the largest of all layers' SVDs. Trained weights are mostly their random initialisation, of which layers
          share nothing: WAVE's optimum is a mean of functions that no layer computes, while FINE's keeps of every
          layer what that does most of.
layers    as many whole layers as the bank holds, each layer starting as the nearest of them, and what is left over of
          the bank approximating what is missing.
random    nothing of the ancestry's matrices: the papers' own start, for training without an ancestry.

Which is the better start was measured on the digits (one seed). WAVE's distillation from "layers" reached in 200
steps what took 400 from "fit". FINE's, at the ancestry's size, from "fit" reached in 50 what took more than 200 from
"layers"; but where all depths are distilled at once, "layers" overtakes it within 1,000 steps (.173 and .176, mean of
four depths): layers that start alike serve all depths alike. Both are exact once the bank is large enough. Where the
seed is known from which the ancestry was initialised, `init_seed` fits what training *added* to that, which is much
smaller.

KIND has but "fit", where every layer is its own SVD. (The paper takes that of untrained weights: condense a model of
`initializers.scratch`.) A random start would be the same without the layers' spectrum.
"""

import copy
import warnings
from collections.abc import Mapping

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ..anatomy import Anatomy, blocks
from ..anatomy.scratch import scratch
from ..anatomy.tensors import tensors_of
from ..functional import wave
from ..tuners.base_config import LearngeneConfig, check_choice
from .layout import Entry, Layout, layout_of, stack
from .methods import Bank, Start, method_of


def closed_form(
    anatomy: Anatomy,
    config: LearngeneConfig,
    *,
    start: Start | None = None,
    init_seed: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, list[int]], Layout, dict[str, Bank], dict[str, Tensor]]:
    """Bank and size tensors of a model.

    Args:
        anatomy: of the model.
        start: see the top of this file; default: the method's better one.
        init_seed: fit W - W_init, where W_init are the weights that `initializers.scratch` draws from that seed.
        seed: of a random start, and of random components where there are none to take.

    Returns:
        Size of its bank by group, the layout of the model, banks by group, and the stacked size tensors by its keys.

    Raises:
        ValueError: no repeated blocks, no target matched, a bank that does not fit a group, or an `init_seed` from
            which these weights were not initialised.
    """
    method = method_of(config)
    start = method.starts[0] if start is None else start
    check_choice("start", start, method.starts)
    if method.per_layer and init_seed is not None:
        raise ValueError(
            f"init_seed={init_seed}: {method.name.upper()} makes weights by class, not what training added to one."
        )
    config = copy.copy(config)
    config.mode = "generate"
    groups = target_groups(anatomy, config)
    sizes = {group.key: list(config.size_of(group)) for group in groups}
    layout = layout_of(anatomy, sizes, method)
    model, tensors, init = anatomy.model, anatomy.tensors, {}
    if init_seed is not None:
        init = tensors_of(scratch(model, {}, seed=init_seed).to(next(model.parameters()).device))
        _check_init(layout, tensors, init, init_seed)

    held, full = 0, False
    if start == "layers":
        holds = [method.layers_held(sizes[group.key], group.shapes, group.num_layers) for group in groups]
        held = min(count for count, _ in holds)
        full = all(count == held and filled for count, filled in holds)
    chosen = {name: wave.spread(min(held, depth), depth) for name, depth in layout.depths.items()}

    generator = torch.Generator().manual_seed(seed)
    bank: dict[str, Bank] = {}
    scalers: dict[str, Tensor] = {}
    for group in groups:
        parts = layout.parts(group.key)
        weights = [_matrices(entry, tensors) for entry in parts]
        if init:
            weights = [weight - _matrices(entry, init) for weight, entry in zip(weights, parts, strict=True)]
        members = list(parts[0].names)
        layers = sorted({_position(members, layer) for layer in chosen[group.matrices[0].stack]})
        if start == "random":
            zero = not any(weight.any() for weight in weights)  # as DiT's own initialisation leaves adaLN
            made = method.random(len(members), sizes[group.key], group.shapes, zero, generator)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made = method.start(weights, sizes[group.key], layers)
        coefficients, bank[group.key] = made
        scalers |= dict(zip(dict.fromkeys(entry.scaler or "" for entry in parts), coefficients, strict=True))

    own = stack(tensors, layout, scalers)
    if held and full:  # the weights of a layer are those of another, so its biases and norms are
        own |= {key: _as_chosen(value, key, layout, chosen) for key, value in own.items() if key.startswith("layers.")}
    return sizes, layout, bank, own


def check_unwrapped(model: nn.Module) -> None:
    """Raise a ValueError if a model is PEFT-wrapped."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("model carries PEFT layers: call merge_and_unload() or unload() on it first.")


def check_ancestry(anatomy: Anatomy) -> None:
    """Raise a ValueError if a model is quantised, holds NaN or infinity, or has fused projections.

    Warn of a DiT with other timestep frequencies than its config makes (`dit.set_frequency_shift_`).
    """
    model = anatomy.model
    if fused := [name for name, module in model.named_modules() if getattr(module, "fused_projections", False)]:
        raise ValueError(
            f"the projections of {fused[0]} are fused, as no config says: call unfuse_qkv_projections(), or load the "
            "model again where that leaves the fused ones behind (as in SD3, PixArt and U-Nets)."
        )
    for name, tensor in anatomy.tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the model is quantised, or holds NaN or infinity ({tensor.dtype}).")
    if isinstance(model, DiTTransformer2DModel):
        shifts = {module.downscale_freq_shift for module in model.modules() if isinstance(module, Timesteps)}
        if shifts != {1}:
            warnings.warn(
                f"the model has timestep frequencies of shift {sorted(shifts)}, which no config records: its "
                "descendants have shift 1. Call set_frequency_shift_ on each of them.",
                stacklevel=3,
            )


def warn_of_experts(anatomy: Anatomy) -> None:
    """Warn of a mixture of experts, of which most numbers stay as they are."""
    experts = sum(tensor.numel() for tensor in anatomy.experts.values())
    total = sum(tensor.numel() for tensor in anatomy.tensors.values())
    if experts > total / 10:
        warnings.warn(
            f"{experts / total:.0%} of the model's numbers are fused experts (tensors of three axes), which are not "
            "shared: they go into the learngene as they are.",
            stacklevel=3,
        )


def check_made_of_config(tensors: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Refuse a model that has other tensors than its config makes: a descendant could not be told to have them."""
    own, other = sorted(tensors.keys() - made.keys()), sorted(made.keys() - tensors.keys())
    if own or other:
        raise ValueError(
            f"the model is not what its config makes: only the model has {own[:3]}, and only its config {other[:3]}. "
            "(Arguments like add_pooling_layer are in no config.)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != made[name].shape:
            raise ValueError(
                f"the model is not what its config makes: {name} has the shape {list(tensor.shape)}, but its config "
                f"asks for {list(made[name].shape)}."
            )


def _check_init(layout: Layout, tensors: dict[str, Tensor], init: dict[str, Tensor], seed: int) -> None:
    """Raise a ValueError if weights have nothing in common with those that the seed draws; trained ones keep .9."""
    factored = [entry for entry in layout.entries.values() if entry.group]
    trained, drawn = (torch.cat([_matrices(e, of).flatten() for e in factored]) for of in (tensors, init))
    cosine = float(nn.functional.cosine_similarity(trained, drawn, dim=0))
    if cosine < 0.05:
        raise ValueError(
            f"init_seed={seed}: the model was not initialised from it (cosine {cosine:.2f} with what it draws). "
            "Leave init_seed out."
        )


def target_groups(anatomy: Anatomy, config: LearngeneConfig) -> list[blocks.Group]:
    """The targeted groups of matrices, each over all layers that have it, as `layout_of` will find them again.

    A matrix that is read without its layer being called stays dense: a wrapper's forward would never run.
    """
    if config.layers_to_transform is not None:
        raise ValueError(f"layers_to_transform={config.layers_to_transform}: a learngene is made of all layers.")
    fields = {"bias": "none", "modules_to_save": None, "tensors_to_save": None, "freeze_bank": False}
    if given := [f"{name}={getattr(config, name)!r}" for name, no in fields.items() if getattr(config, name) != no]:
        raise ValueError(
            f"{', '.join(given)}: a learngene keeps whatever is not factored, biases included, and its descendants "
            "train the biases: leave it out."
        )
    matrices = anatomy.shareable
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        groups = blocks.group_matrices(matrices, config.share_qkv)
        config = copy.copy(config)
        config.target_modules = [m.name for g in groups if targets or g.num_layers > 1 for m in g.matrices]
    else:
        anatomy.check_called(m.name for m in anatomy.matrices if check_target_module_exists(config, m.name))
    chosen = {matrix for matrix in matrices if check_target_module_exists(config, matrix.name)}
    if not chosen:
        raise ValueError(
            f"target_modules={targets!r} matches no matrix in the blocks of {type(anatomy.model).__name__}, which "
            f"have {anatomy.default_targets}."
        )
    roles = {(matrix.stack, matrix.role) for matrix in chosen}
    groups = blocks.group_matrices([m for m in matrices if (m.stack, m.role) in roles], config.share_qkv)
    groups = [group for group in groups if not chosen.isdisjoint(group.matrices)]
    for group in groups:
        if left := [matrix.name for matrix in group.matrices if matrix not in chosen]:
            raise ValueError(f"target_modules leaves out {left[0]} of {group.key}: target all of its layers, or none.")
    config.check_groups(groups)
    return groups


def _matrices(entry: Entry, tensors: dict[str, Tensor]) -> Tensor:
    """The weights of one role, (L, m1, m2) in float32."""
    assert entry.form is not None  # every factored entry has one
    weights = torch.stack([tensors[name].detach() for name in entry.names.values()]).float()
    return blocks.weight_to_matrix(weights, entry.form)


def _position(members: list[int], layer: int) -> int:
    """Index in `members` (the layers that have a tensor) of the layer nearest to `layer`."""
    return members.index(wave.nearest(members, layer))


def _as_chosen(value: Tensor, key: str, layout: Layout, chosen: dict[str, list[int]]) -> Tensor:
    """A per-layer tensor (L, ...) with every layer replaced by the chosen layer nearest to it."""
    members = list(layout.entries[key].names)
    layers = chosen[layout.stack_of[key]]
    return value[[_position(members, wave.nearest(layers, layer)) for layer in members]]
