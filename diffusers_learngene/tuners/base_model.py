# SPDX-License-Identifier: Apache-2.0
"""Injects the layers of a learngene method into a model: which layers, which groups, who shares and owns what.

All of it is decided before the model is touched, so that a config which does not fit leaves the model as it was. The
tuner object keeps no tensors: diffusers and transformers throw it away after the injection.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.blocks import Group, Matrix, matrix_shape, unwrap
from .base_config import LearngeneConfig
from .base_layer import LearngeneLayer
from .base_sharing import Bank, Scaler, share_key
from .mixed_batch import adapters_by_sample
from .names import check_adapter_name
from .own_tensors import OwnTensorsTuner
from .weighted import WeightedSum


@dataclass
class SharedGroup:
    """A bank as it lies in a model: the name of what shares it, and the layers that use it, by module name."""

    key: str
    bank: Bank
    layers: dict[str, LearngeneLayer] = field(default_factory=dict)


def shared_groups(model: nn.Module, adapter_name: str = "default") -> dict[str, SharedGroup]:
    """The banks of an adapter, by name. (To shard a model with FSDP, wrap each bank before the blocks.)"""
    groups: dict[str, SharedGroup] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LearngeneLayer) and adapter_name in layer.bank_refs:
            key = layer.bank_keys[adapter_name]
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


def check_read(model: nn.Module, name: str) -> None:
    """Raise a ValueError if diffusers reads another weight than this layer's, because projections are fused, or were.

    It keeps q, k and v beside the one matrix of all; its older classes go on keeping that after they are unfused.
    """
    path, _, role = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if not getattr(parent, "fused_projections", False):
        return
    from diffusers.models.attention_processor import Attention  # (takes half a second)

    fused = not isinstance(parent, Attention) or type(parent.processor).__name__.startswith("Fused")
    parts = {"to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"} | (
        set() if hasattr(parent, "to_kv") else {"to_q"}
    )
    if role in (parts if fused else {"to_qkv", "to_kv", "to_added_qkv"}):
        raise ValueError(
            f"Target module {name} is not read, because the projections of {path} {'are' if fused else 'were'} fused: "
            "call unfuse_qkv_projections(), load the model again, or leave it out of target_modules."
        )


def is_zero(module: nn.Module) -> bool:
    """Whether the weight of a layer is there to be read, and all zero."""
    weight = unwrap(module).weight
    return isinstance(weight, Tensor) and weight.numel() > 0 and not weight.is_meta and not weight.any()


@dataclass
class _Plan:
    """What one injection is about to do: group, matrix and offset of every targeted module, and what it has made."""

    targets: dict[str, tuple[Group, Matrix, int]]
    zeros: set[str]  # modules whose weight is to be generated and is zero so far
    banks: dict[str, Bank] = field(default_factory=dict)
    scalers: dict[str, Scaler] = field(default_factory=dict)


class LearngeneModel(OwnTensorsTuner):
    """Base of the tuners; a method sets the class attributes and says what its banks and scalers are."""

    linear_cls: type[LearngeneLayer]
    conv_cls: type[LearngeneLayer]
    target_module_mapping: dict[str, list[str]] = {}  # read off the model instead
    # The state that layers share lies in the layers, so injecting without a PeftModel loses nothing.
    uses_shared_state = False

    # What a method adds

    def _create_bank(self, config: Any, group: Group) -> Bank:
        """The initialised bank of a group (on the meta device if that is where parameters are now being made)."""
        raise NotImplementedError

    def _create_scaler(self, config: Any, bank: Any, group: Group, matrix: Matrix) -> Scaler:
        """The scaler of a matrix, or of its layer, at random."""
        raise NotImplementedError

    # Which layers

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            try:
                targets = self._anatomy.default_targets
            except ValueError as error:
                raise ValueError(f"{error} Name the layers to adapt in target_modules.") from error
            peft_config.target_modules = set(targets)
        every = peft_config.target_modules == "all-linear"
        peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
        if every:
            peft_config.target_modules -= self._anatomy.uncalled
        return peft_config

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
                check_read(model, name)
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
        check_adapter_name(adapter_name, model, self.prefix)
        self._anatomy = Anatomy.of(model)
        self._stacks = tuple(self._anatomy.stacks)
        self._named_in_file: set[str] | None = None
        if self.tuner_layer_cls.scaler_scope != "matrix":
            state_dict = None  # a file does not name every layer; the config does
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
            self._plan = _Plan({}, set())
            self._named_in_file = None
            del self._anatomy  # of the model as it was
        # PEFT has left all tensors of the model as they were if it had adapters before.
        if adapter_name in self.active_adapters and not self.peft_config[adapter_name].inference_mode:
            self.train_own_tensors([adapter_name], True)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        names = self._targeted(peft_config, model)
        self._anatomy.check_called(names)
        groups = self._anatomy.groups_of(names, peft_config.share_qkv)
        if groups:
            peft_config.check_groups(groups)
        modules = {name: model.get_submodule(name) for name in names}
        zeros = set()
        if peft_config.mode == "generate":
            for name, module in modules.items():
                check_droppable(name, module, get_quantization_kwargs(self))
            zeros = {name for name, module in modules.items() if is_zero(module)}
        self.check_own_tensors(peft_config, model, names)
        places = [(group, *place) for group in groups for place in zip(group.matrices, group.offsets, strict=True)]
        self._plan = _Plan({matrix.name: (group, matrix, offset) for group, matrix, offset in places}, zeros)

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
        plan, layer_cls = self._plan, self.tuner_layer_cls
        group, matrix, offset = plan.targets[current_key]
        bank_key = share_key(layer_cls.bank_scope, group, matrix)
        owns_bank = bank_key not in plan.banks
        if owns_bank:
            plan.banks[bank_key] = self._create_bank(peft_config, group)
        scaler_key = share_key(layer_cls.scaler_scope, group, matrix)
        owns_scaler = scaler_key not in plan.scalers
        if owns_scaler:
            scaler = self._create_scaler(peft_config, plan.banks[bank_key], group, matrix)
            users = [m.name for m in group.matrices if share_key(layer_cls.scaler_scope, group, m) == scaler_key]
            # Added, the adapter starts as the identity; generated, what is zero (DiT's adaLN-Zero) as zero. Gradients
            # reach the scaler, and from then on the bank.
            if plan.zeros.issuperset(users) if peft_config.mode == "generate" else peft_config.init_weights:
                nn.init.zeros_(scaler.weight)
            plan.scalers[scaler_key] = scaler
        if isinstance(target, layer_cls):
            layer = target
        else:
            layer_cls = self.conv_cls if isinstance(unwrap(target), nn.Conv2d) else self.linear_cls
            layer = layer_cls(target, get_quantization_kwargs(self))
            layer.set_adapter(adapter_name)
        layer.update_layer(
            adapter_name,
            plan.banks[bank_key],
            plan.scalers[scaler_key],
            peft_config,
            bank_key=bank_key,
            offset=offset,
            owns_bank=owns_bank,
            owns_scaler=owns_scaler,
        )
        if peft_config.mode == "generate":
            layer.drop_weight()
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

    # Several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a PeftModel's forward or generate, whose arguments these are."""
        names = kwargs.get("adapter_names")
        beams = kwargs.get("num_beams")
        with nullcontext() if names is None else adapters_by_sample(self.model, names, beams or 1):
            yield

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters, exactly, as a new adapter, which is not active yet.

        Args:
            adapters: names. They may have other targets and sizes; their modes have to be the same.
            weights: one number each; the adapters' present scales count as well.
            adapter_name: of the sum.

        Raises:
            ValueError: the name is taken, or there is no such sum (`weighted.WeightedSum`). The model is as it was.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: choose another adapter_name.")
        weighted = WeightedSum(self.model, adapters, weights)
        self.peft_config[adapter_name] = weighted.config
        self.inject_adapter(self.model, adapter_name)
        weighted.fill_(self.model, adapter_name)
