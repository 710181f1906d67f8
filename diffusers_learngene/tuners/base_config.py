# SPDX-License-Identifier: Apache-2.0
"""What the configs of all learngene methods have in common.

A config may come from a stranger's JSON, so that every field is checked for type and range before anything is
allocated, and no field names a module to import, a path or a URL.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig

from ..anatomy.blocks import Group


Mode = Literal["add", "generate"]
Bias = Literal["none", "all", "learngene_only"]

# Targets given as one string are regular expressions (PEFT's convention), and long ones can be made slow.
MAX_PATTERN_LENGTH = 4096
# 8 GiB of fp32 in one tensor: no bank of any published model comes near it.
MAX_NUMBERS = 2**31
# A docstring's list of arguments.
_ARGS = re.compile(r"^Args:\n((?: +\S.*\n)+)", re.MULTILINE)


@dataclass
class LearngeneConfig(PeftConfig):
    """Fields of every learngene method, which is a function W = f(bank, scaler).

    The docstring of a method's own config lists only what it adds, and is completed with what is said here.

    Args:
        target_modules: layers to adapt: names or endings of names, or one regular expression, or `"all-linear"`.
            Default: the matrices that recur in the model's repeated blocks (`Anatomy.default_targets`).
        exclude_modules: layers to leave out: names or endings of names, or one regular expression.
        modules_to_save: modules to train and save in full beside the adapter.
        tensors_to_save: tensors of the model to train, in their place, and save beside the adapter, by full name, in
            which "*" stands for any number: `["blocks.*.norm.weight"]`. (`modules_to_save` trains copies of modules.)
        layers_to_transform: numbers of the blocks to adapt. Default: all.
        layers_pattern: names of the lists of blocks that these numbers count. Default: the model's stacks.
        mode: `"add"`: W + f(bank, scaler), the identity at the start: an adapter of a pre-trained model.
            `"generate"`: W = f(bank, scaler), and W itself is freed: what condensing and descending use.
        share_qkv: whether q, k and v of one attention are rows of one matrix, as in the papers, and so share WAVE's
            templates, or FINE's and KIND's V and sigma.
        bias: biases to train: `"none"`, `"all"` of the model, or `"learngene_only"`, those of adapted layers.
        freeze_bank: whether to train the scalers alone, the bank staying as it is (`freeze_bank_` sets it later).
        init_weights: whether `"add"` starts as the identity. False: random scalers, which are of use in tests.

    Raises:
        ValueError: a field has the wrong type or an impossible value.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    tensors_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    mode: Mode = "add"
    share_qkv: bool = True
    bias: Bias = "none"
    freeze_bank: bool = False
    init_weights: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Complete the docstring of a method's config, for `help` and whoever else reads `__doc__`."""
        super().__init_subclass__(**kwargs)
        parent = cls.__base__
        if cls.__doc__ and parent and parent.__doc__:  # Python may be told to drop docstrings
            shared = _ARGS.search(cleandoc(parent.__doc__))
            cls.__doc__ = _ARGS.sub(lambda own: own[0] + (shared[1] if shared else ""), cleandoc(cls.__doc__))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = check_names(name, getattr(self, name))
            setattr(self, name, value if value is None or isinstance(value, str) else set(value))
        for name in ("modules_to_save", "tensors_to_save"):
            setattr(self, name, check_names(name, getattr(self, name), pattern=False))
        self.layers_pattern = check_names("layers_pattern", self.layers_pattern)
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            for layer in layers if isinstance(layers, list | tuple) else [layers]:
                check_integer("layers_to_transform", layer, least=0)
            self.layers_to_transform = list(layers) if isinstance(layers, list | tuple) else layers
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("bias", self.bias, get_args(Bias))
        for name in ("share_qkv", "freeze_bank", "init_weights", "inference_mode"):
            check_choice(name, getattr(self, name), (True, False))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says what layers_to_transform counts: give layers_to_transform as well.")
        if (
            self.layers_to_transform is not None
            and isinstance(self.target_modules, str)
            and self.target_modules.lower() != "all-linear"
        ):
            raise ValueError(
                f"layers_to_transform has no effect on a regular expression (target_modules={self.target_modules!r}): "
                "give target_modules as a list, or the layer numbers in the expression."
            )

    # Name of the field that sets the sizes of groups one by one.
    pattern_name: ClassVar[str]

    def size_of(self, group: Group) -> tuple[int, ...]:
        """Size of the bank of a group.

        Raises:
            ValueError: it does not fit the group.
        """
        raise NotImplementedError

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Raise a ValueError if the config does not fit the groups of a model."""
        keys = [group.key for group in groups]
        if unknown := set(getattr(self, self.pattern_name) or ()) - set(keys):
            raise ValueError(f"{self.pattern_name} names the groups {sorted(unknown)}, but this model has {keys}.")
        for group in groups:
            self.size_of(group)

    def check_addable(self, other: "LearngeneConfig") -> None:
        """Raise a ValueError if adapters of this config and another, of one method and mode, have no sum."""

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON has them; sets are sorted, so that equal configs make equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError unless `value` is one of `choices` (1 is not True)."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_integer(name: str, value: Any, least: int = 1, most: int = MAX_NUMBERS) -> None:
    """Raise a ValueError unless `value` is a whole number between `least` and `most` (True is not a number)."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number between {least} and {most}.")


def check_numbers(name: str, size: Iterable[int]) -> None:
    """Raise a ValueError unless every side of `size` and their product are sane for one tensor."""
    numbers = 1
    for side in size:
        check_integer(name, side)
        numbers *= side
    if numbers > MAX_NUMBERS:
        raise ValueError(f"{name}={tuple(size)} asks for a tensor of {numbers} numbers, more than {MAX_NUMBERS}.")


def check_pattern(name: str, pattern: Any, sizes: str, length: int | None = None) -> None:
    """Raise a ValueError unless `pattern` maps groups to what `sizes` says in words: lists, if of some `length`."""
    if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
        raise ValueError(f"{name}={pattern!r} must map groups to {sizes}.")
    for key, size in pattern.items():
        if length is not None and (not isinstance(size, list | tuple) or len(size) != length):
            raise ValueError(f"{name}[{key!r}]={size!r} must be {sizes}.")


def check_names(name: str, value: Any, pattern: bool = True) -> Any:
    """Names as a list, or a pattern as it is.

    Raises:
        ValueError: neither, longer than `MAX_PATTERN_LENGTH`, or a pattern that is no regular expression.
    """
    if value is None:
        return None
    given = [value] if isinstance(value, str) and pattern else value
    if not isinstance(given, list | tuple | set) or not all(isinstance(item, str) for item in given):
        kinds = "a list of names or one pattern" if pattern else "a list of names"
        raise ValueError(f"{name}={value!r} must be {kinds}.")
    for item in given:
        if len(item) > MAX_PATTERN_LENGTH:
            raise ValueError(f"{name} holds a string of {len(item)} characters, more than {MAX_PATTERN_LENGTH}.")
        if isinstance(value, str) or name == "layers_pattern":
            try:
                re.compile(item)
            except re.error as error:
                raise ValueError(f"{name}={item!r} is no regular expression: {error}.") from error
    return value if isinstance(value, str) else list(value)
