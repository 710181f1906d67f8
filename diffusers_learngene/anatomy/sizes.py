# SPDX-License-Identifier: Apache-2.0
"""The config of a model of another size, by the keys of its own config: what may change, and what changes with it.

Only depth and width may: another patch, window or rotary base makes another function of the same tensors. With the
depth, everything that a config says layer by layer goes to the layer at the same relative depth, as the weights do.
With the width, heads keep their width, and keys the number of queries that share them, or weights would be cut apart.
"""

import re
from collections.abc import Iterator
from typing import Any

from ..functional.resize import relative_layers


_MAX_COUNT = 4096
_DEPTH = re.compile(r"((num|n)_)?(.*_)?(layers?|blocks|depths?)")
_WIDTH = re.compile(
    r"(?!.*(rope|rotary|index))(.*_)?(heads?|dims?|hidden_sizes?|intermediate_size|inner|inner_size|embedding_size|"
    r"feed_forward_size|embd|model|kv|ff|dff|mlp_ratios?|ffn_ratio|ffn_hidden_size|ff_mult|ffn_mult|head_size|latents)"
)
_BY_LAYER = re.compile(r".*layer.*|.*_types|.*_pattern|intermediate_size")  # other lists may be as long by chance

_HEADS = re.compile(r"(?!.*(kv|key|value|mamba|linear|index))(.*_)?heads?")
_HEAD_DIMS = ("attention_head_dim", "head_dim", "d_kv", "d_head")
_WIDTHS = ("hidden_size", "hidden_sizes", "n_embd", "d_model", "dim", "embed_dim", "emb_dim")
_STAGE_WIDTHS = ("hidden_sizes", "embed_dim")
_SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def override_config(architecture: str, config: dict, overrides: dict) -> dict:
    """`config` with `overrides`, whose keys must be depths and widths in the config.

    Lists of layers that are not overridden follow the depth, and what a class derives from its depth is left to it.

    Raises:
        ValueError: unknown key, one that is neither depth nor width, a value that is no size, heads of another width,
            or another number of queries for each key.
    """
    for key, value in overrides.items():
        if key not in config:
            sizes = ", ".join(sorted(sizes_of(config)))
            raise ValueError(f"{architecture} has no config key {key!r}. Its sizes are: {sizes}.")
        _check_size(key, value, config[key])
    merged = {**config, **overrides}
    for key, value in overrides.items():
        old = config[key]
        if type(value) is int and type(old) is int and value != old > 0 and _DEPTH.fullmatch(key):
            merged = _at_depth(merged, old, value, overrides)
    _check_heads(config, merged)
    _check_shared_heads(config, merged)
    return merged


def _at_depth(config: dict, old: int, new: int, given: dict) -> dict:
    """`config` with what it says of `old` layers said of `new` ones."""
    layers = relative_layers(old, new)
    result = {}
    for key, value in config.items():
        if isinstance(value, list | tuple) and key not in given and _BY_LAYER.fullmatch(key):
            if len(value) == old and list(value) != list(range(old)):
                value = [value[layer] for layer in layers]
            elif all(type(item) is int and 0 <= item < old for item in value) and len(set(value)) == len(value):
                value = [layer for layer, source in enumerate(layers) if source in value]  # indices, as SD3.5's
        result[key] = value
    if len(config.get("stage_names") or ()) == old + 1:  # a stage is a layer: a backbone, which names them itself
        outputs = result.get("out_indices") or [old]
        result["out_indices"] = sorted({max(1, round(i % (old + 1) * new / old)) if i else 0 for i in outputs})
        del result["stage_names"]
        result.pop("out_features", None)
    return result


def _check_heads(config: dict, merged: dict) -> None:
    """Raise a ValueError if attention heads would change their width."""
    for key in _HEAD_DIMS:
        old, new = config.get(key), merged.get(key)
        if old != new:
            raise ValueError(f"{key}={new} makes attention heads of {new} instead of {old}: change their number only.")
    before = {(heads, stage): (width, count) for heads, _, stage, width, count in _head_widths(config)}
    for heads, name, stage, width, count in _head_widths(merged):
        old_width, old_count = before.get((heads, stage), (width, count))
        if old_width % old_count or width * old_count == old_width * count:
            continue
        old = old_width // old_count
        given = f"{name}={merged[name]} with {heads}={merged[heads]}"
        made = f"makes attention heads of {width // count} instead of {old}"
        if width % count:
            made = f"makes no whole attention heads, which are {old} wide"
        raise ValueError(f"{given} {made}: {name} must be {old} times {heads}.")


def _head_widths(config: dict) -> Iterator[tuple[str, str, int, int, int]]:
    """Key of the heads, key of the width they divide, stage, width and number of heads, of every attention."""
    if any(type(config.get(key)) is int for key in _HEAD_DIMS):
        return
    for heads, counts in config.items():
        if not _HEADS.fullmatch(heads):
            continue
        if isinstance(counts, list | tuple):
            name = next((key for key in _STAGE_WIDTHS if config.get(key)), None)
            widths = config[name] if name else ()
            if type(widths) is int:  # of the first stage; every further one is twice as wide
                widths = [widths << stage for stage in range(min(len(counts), _MAX_COUNT))]
        else:
            name = next((key for key in _WIDTHS if type(config.get(key)) is int), None)
            widths, counts = [config[name]] if name else (), [counts]
        for stage, (width, count) in enumerate(zip(widths, counts, strict=False)):
            if name and type(width) is int and type(count) is int and count > 0:
                yield heads, name, stage, width, count


def _check_shared_heads(config: dict, merged: dict) -> None:
    """Raise a ValueError if keys and values would serve other queries than they do (where one serves all, it may)."""
    heads = next((key for key in ("num_attention_heads", "n_heads", "num_heads") if key in config), "")
    for shared in _SHARED_HEADS:
        old: list[Any] = [config.get(heads), config.get(shared)]
        new: list[Any] = [merged.get(heads), merged.get(shared)]
        if not all(type(number) is int and number > 0 for number in (*old, *new)) or old[1] == new[1] == 1:
            continue
        if new[0] % new[1]:
            raise ValueError(f"{heads}={new[0]} is not a multiple of {shared}={new[1]}.")
        if new[0] * old[1] != old[0] * new[1]:
            ratio = old[0] // old[1]
            raise ValueError(
                f"{shared}={new[1]} with {heads}={new[0]} makes {new[0] // new[1]} queries share a key instead of "
                f"{ratio}: {heads} must be {ratio} times {shared}."
            )


def sizes_of(config: dict) -> dict[str, int]:
    """What in a config may be a size."""
    return {key: value for key, value in config.items() if type(value) is int and not key.endswith("_id")}


def _check_size(key: str, value: Any, old: Any) -> None:
    if type(value) is type(old) and value == old or isinstance(old, list) and list(old) == value:
        return
    number = type(old) is int or old is None
    if isinstance(old, list) and isinstance(value, list | tuple):
        whole = len(value) <= _MAX_COUNT and all(type(item) is int and item >= 0 for item in (*value, *old))
    else:
        whole = number and type(value) is int and value > 0
    if not whole:
        kind = "a positive integer" if number else "left as it is or a list like it"
        raise ValueError(f"{key}={value!r} must be {kind}: it is {old!r} in the learngene, and only sizes can change.")
    if number and value > _MAX_COUNT and _DEPTH.fullmatch(key):
        raise ValueError(f"{key}={value} is out of range: more than {_MAX_COUNT}.")
    if not (_DEPTH.fullmatch(key) or _WIDTH.fullmatch(key) or _BY_LAYER.fullmatch(key)):
        raise ValueError(f"{key}={value!r} must be left {old!r} as in the learngene: only depth and width can change.")


def depth_key(config: dict) -> str:
    """The config key that says how many blocks there are.

    Raises:
        ValueError: the config has none by a known name.
    """
    for key in ("num_layers", "num_hidden_layers", "n_layer", "n_layers"):
        if key in config:
            return key
    raise ValueError(f"this config names its depth in another way: {sorted(config)}.")


def width_overrides(config: dict, heads: int) -> dict:
    """Config overrides for a width of that many heads of the same head dimension; empty for the width as it is.

    Understands both ways of saying a width: heads x attention_head_dim (diffusers), and hidden_size with its
    intermediate_size (transformers).
    """
    old = config["num_attention_heads"]
    if heads == old:
        return {}
    scaled = ("hidden_size", "intermediate_size", "num_key_value_heads")
    sizes = {key: max(1, config[key] * heads // old) for key in scaled if isinstance(config.get(key), int)}
    return {"num_attention_heads": heads, **sizes}


def size_overrides(config: dict, depth: int, heads: int) -> dict:
    """Config overrides for a depth and a width of that many heads."""
    return {depth_key(config): depth, **width_overrides(config, heads)}
