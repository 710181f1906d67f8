# SPDX-License-Identifier: Apache-2.0
"""Tensors of the model itself that an adapter trains, in their place, and keeps in its file: `tensors_to_save`.

What PEFT's `bias` does for biases, by name: the biases and norms of a descendant's blocks, say. A name is that of the
plain model's tensor, in which "*" stands for any number: "transformer_blocks.*.ff.net.2.bias".
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .base_config import LearngeneConfig
from .scalers import PREFIX, plain_name


def own_names(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Of the tensors of a model, wrapped or not, those that the patterns mean: name in it, by name in the plain model.

    Raises:
        ValueError: a pattern that means none.
    """
    own = {plain_name(name): name for name in names}
    found: dict[str, str] = {}
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        meant = [pattern] if pattern in own else [name for name in own if expression.fullmatch(name)]
        if not meant:
            raise ValueError(f"tensors_to_save: {pattern!r} is no tensor of this model's state dict.")
        found |= {name: own[name] for name in meant}
    return found


def with_stars(names: Collection[str], among: Iterable[str]) -> list[str]:
    """The shortest patterns that mean these names, and no other among those of the model."""
    alike = defaultdict(list)
    for name in among:
        alike[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    patterns: list[str] = []
    for pattern, members in alike.items():
        wanted = [name for name in members if name in names]
        patterns += [pattern] if len(wanted) == len(members) > 1 else wanted
    return patterns


class OwnTensorsTuner(BaseTuner):
    """A tuner whose adapters train and save `tensors_to_save`; whoever derives from it calls the first two methods."""

    def check_own_tensors(self, config: LearngeneConfig, model: nn.Module, targets: Sequence[str]) -> None:
        """Raise a ValueError if `tensors_to_save` names what is not there, or what is an adapter's already.

        Args:
            targets: the layers that the adapter is for.
        """
        if not config.tensors_to_save:
            return
        names = list(model.state_dict(keep_vars=True))
        taken = {f"{plain_name(target)}.weight": "this adapter, whose target it is" for target in targets}
        for name, other in self.peft_config.items():
            if other is not config:
                taken |= dict.fromkeys(own_names(_patterns(other), names), f"adapter {name!r}")
        if twice := sorted(own_names(config.tensors_to_save, names).keys() & taken.keys()):
            raise ValueError(f"tensors_to_save: {twice[0]!r} is trained by {taken[twice[0]]}: leave it out.")

    def train_own_tensors(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Switch the gradients of what these adapters train of the model itself."""
        patterns = [pattern for name in adapter_names for pattern in _patterns(self.peft_config[name])]
        parameters = dict(self.model.named_parameters())  # neither buffers nor what is tied to another
        for name in own_names(patterns, self.model.state_dict(keep_vars=True)).values() if patterns else ():
            if name in parameters:
                parameters[name].requires_grad_(requires_grad)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's: what belongs to the active adapters is trained, of the model itself as well."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        active = set(self.active_adapters)
        self.train_own_tensors([name for name in self.peft_config if name not in active], False)
        self.train_own_tensors([name for name in self.peft_config if name in active], not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's, of the model itself as well."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.train_own_tensors([adapter_names] if isinstance(adapter_names, str) else adapter_names, requires_grad)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return found | {name: state_dict[name] for name in own_names(_patterns(config), state_dict).values()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's. What is the model's own keeps its device and dtype, whether it is copied into or replaced.

        Raises:
            ValueError: one of `tensors_to_save` is not in the file.
        """
        own = model.state_dict(keep_vars=True)
        wanted = own_names(_patterns(config), own)
        if missing := sorted(wanted.keys() - {plain_name(name) for name in state_dict}):
            raise ValueError(f"The file of adapter {adapter_name!r} lacks {missing}, which its config says it holds.")
        named = {wanted.get(plain_name(name), name): tensor for name, tensor in state_dict.items()}
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        for name, tensor in found.items():
            there = own.get(name, own.get(name.removeprefix(PREFIX)))
            if there is not None and not there.is_meta and f".{cls.prefix}" not in name:
                found[name] = tensor.to(there.device, there.dtype)
        return found


def _patterns(config: PeftConfig) -> list[str]:
    return getattr(config, "tensors_to_save", None) or []
