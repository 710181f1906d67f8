# SPDX-License-Identifier: Apache-2.0
"""Injects the layers of a learngene method into a model: which layers, which groups, who owns the bank.

All of it is decided before the model is touched, so that a config which does not fit leaves the model as it was. The
tuner object keeps no tensors: diffusers and transformers throw it away after the injection.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from ..blocks import Group, Matrix, default_targets, find_stacks, group_modules, matrix_shape, unwrap
from .base_config import LearngeneConfig
from .base_layer import LearngeneLayer


@dataclass
class SharedGroup:
    """A group as it lies in a model: its name, its bank, and the layers that use it, by module name."""

    key: str
    bank: nn.Module
    layers: dict[str, LearngeneLayer] = field(default_factory=dict)


def shared_groups(model: nn.Module, adapter_name: str = "default") -> dict[str, SharedGroup]:
    """The groups of an adapter, by name. (To shard a model with FSDP, wrap each group's bank before the blocks.)"""
    groups: dict[str, SharedGroup] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LearngeneLayer) and adapter_name in layer.bank_refs:
            key = layer.group_keys[adapter_name]
            group = groups.setdefault(key, SharedGroup(key, layer.bank(adapter_name)))
            group.layers[name] = layer
    return groups


def check_droppable(name: str, module: nn.Module, quantization: dict[str, Any]) -> None:
    """Raise a ValueError if a generated weight cannot take the place of this module's."""
    reason = None
    base = module.base_layer if isinstance(module, LearngeneLayer) else module
    if isinstance(base, BaseTunerLayer):
        reason = f"it is inside a {type(base).__name__} layer: merge and unload that adapter first"
    elif isinstance(module, LearngeneLayer) and module.merged:
        reason = f"{', '.join(module.merged_adapters)} is merged into it: unmerge first"
    elif resolve_quantization_backend(base, **quantization) is not None:
        reason = "it is quantised: load the model without quantisation, of which nothing would be left anyway"
    if reason:
        raise ValueError(f'mode="generate" cannot replace the weight of {name}, because {reason}.')


@dataclass
class _Plan:
    """What one injection is about to do: the group and the matrix of every targeted module, and the banks so far."""

    targets: dict[str, tuple[Group, Matrix]]
    banks: dict[str, nn.Module] = field(default_factory=dict)


class LearngeneModel(BaseTuner):
    """Base of the tuners; a method sets the class attributes and says what its banks and scalers are."""

    linear_cls: type[LearngeneLayer]
    conv_cls: type[LearngeneLayer]
    target_module_mapping: dict[str, list[str]] = {}  # read off the model instead
    # The state that layers share lies in the layers, so injecting without a PeftModel loses nothing.
    uses_shared_state = False

    # What a method adds

    def _check_config(self, config: Any, groups: list[Group]) -> None:
        """Raise a ValueError if the config does not fit these groups; called before anything is changed."""
        raise NotImplementedError

    def _create_bank(self, config: Any, group: Group) -> nn.Module:
        """The initialised bank of a group (on the meta device if that is where parameters are now being made)."""
        raise NotImplementedError

    def _create_scaler(self, config: Any, bank: Any, matrix: Matrix) -> nn.Module:
        """The initialised scaler of one layer."""
        raise NotImplementedError

    # Which layers

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            try:
                targets = default_targets(self.model)
            except ValueError as error:
                raise ValueError(f"{error} Name the layers to adapt in target_modules.") from error
            peft_config.target_modules = set(targets)
        return _maybe_include_all_linear_layers(peft_config, self.model)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """PEFT's rule, except for layers_to_transform.

        PEFT wants `something.<list>.<number>.`, which a list at the root of the model (DiT's `transformer_blocks`)
        does not match, and it ignores the numbers for targets named in full. Here they count the blocks of the
        model's stacks.
        """
        config = copy.copy(peft_config)
        config.layers_to_transform = None
        found = check_target_module_exists(config, key)
        layers = peft_config.layers_to_transform
        if not found or layers is None:
            return found
        if peft_config.layers_pattern:
            patterns = peft_config.layers_pattern
            patterns = [patterns] if isinstance(patterns, str) else patterns
        else:
            patterns = [re.escape(stack) for stack in self._stacks] or [r"[^.]+"]
        match = re.match(rf"(?:.*?\.)?(?:{'|'.join(patterns)})\.(\d+)\.", key)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)

    def _targeted(self, config: LearngeneConfig, model: nn.Module) -> list[str]:
        """Names of the modules that the injection will visit, as `BaseTuner.inject_adapter` finds them."""
        names = []
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (name + ".",)
            if self._named_in_file is None:
                targeted = bool(self._check_target_module_exists(config, name))
            else:
                targeted = name.removeprefix("_orig_mod.") in self._named_in_file
            if targeted:
                if matrix_shape(module) is None:
                    raise ValueError(
                        f"Target module {name} ({type(module).__name__}) is not supported. Currently, only the "
                        "following modules are supported: torch.nn.Linear (quantised or not), torch.nn.Conv2d with "
                        "1x1 kernels and groups=1, transformers.pytorch_utils.Conv1D."
                    )
                names.append(name)
        return names

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As `BaseTuner.inject_adapter`; all or nothing."""
        self._stacks = tuple(find_stacks(model))
        self._named_in_file: set[str] | None = None
        if state_dict is not None:
            names = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
            self._named_in_file = {name.removeprefix("_orig_mod.") for name in names}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        finally:
            self._plan = _Plan({})
            self._named_in_file = None

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        names = self._targeted(peft_config, model)
        groups = group_modules(model, names, peft_config.share_qkv)
        if groups:
            self._check_config(peft_config, groups)
        if peft_config.mode == "generate":
            for name in names:
                check_droppable(name, model.get_submodule(name), get_quantization_kwargs(self))
        self._plan = _Plan({matrix.name: (group, matrix) for group in groups for matrix in group.matrices})

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        group, matrix = self._plan.targets[current_key]
        owns_bank = group.key not in self._plan.banks
        if owns_bank:
            self._plan.banks[group.key] = self._create_bank(peft_config, group)
        bank = self._plan.banks[group.key]
        scaler = self._create_scaler(peft_config, bank, matrix)
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        else:
            layer_cls = self.conv_cls if isinstance(unwrap(target), nn.Conv2d) else self.linear_cls
            layer = layer_cls(target, get_quantization_kwargs(self))
            layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, group.key, bank, scaler, peft_config, owns_bank=owns_bank)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter: PEFT trains the active ones only
            self._replace_module(parent, target_name, layer, target)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        for layer in self.model.modules():  # before the first layer is unloaded
            if isinstance(layer, LearngeneLayer):
                names = (layer.active_adapters if adapter_names is None else adapter_names) if merge else []
                layer.check_has_weight(list(dict.fromkeys([*layer.merged_adapters, *names])))
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
