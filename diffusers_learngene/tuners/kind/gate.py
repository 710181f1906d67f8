# SPDX-License-Identifier: Apache-2.0
"""Which class every sample of the running forward pass has: where KIND's layers read it, and who says it.

A model has one `GateState`, which all its KIND layers refer to: a stack, whose top is the gate now. It is pushed by

1. the model's own `class_labels`: hooks on the model push them before its forward and pop them after it, also when it
   raises;
2. `class_gate(...)`, for models without labels; it wins over labels.

Gradient checkpointing runs blocks again in the backward pass, after the forward and maybe after other forwards. So,
while a gate is on top, what is handed to a module's checkpointing function (diffusers and transformers keep it in one
place) is bound to that gate, and pushes it whenever it is run. A compiler recomputes inside its graph, and needs none.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..base_config import check_integer
from .config import KINDConfig


# The attribute of a model that holds its state, for the hooks.
STATE = "_learngene_gate"


def check_ids(what: str, ids: Tensor, dims: Sequence[int] = (0, 1)) -> None:
    """Raise a ValueError unless a tensor can be ids of classes: one for every sample, or a single one for all."""
    if ids.dim() not in dims or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{what} of shape {list(ids.shape)} and {ids.dtype} is none: give one id, ids (B,), or weights (B, "
            "num_classes)."
        )


class ClassTable(nn.Module):
    """Rows of units by class: `KINDConfig.gate_matrix`, made from the config and never saved, behind a call."""

    def __init__(self, config: KINDConfig) -> None:
        super().__init__()
        matrix, known = config.gate_matrix()
        self.num_classes, self.num_units = len(matrix) - 1, matrix.shape[1]
        classes = known[:-1].nonzero().flatten().tolist()
        self.only_class: int | None = classes[0] if len(classes) == 1 else None
        # Of the tailors, those which a class opens, on average.
        self.share = matrix[classes].float().mean().item() if classes and self.num_units else 0.0
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("known", known, persistent=False)

    def forward(self, classes: "Tensor | int") -> Tensor:
        """Open units: of ids (B,) -> bool (B, n); of one class -> bool (n,); of weights (B, C) -> (B, n).

        Raises:
            ValueError: classes that do not exist or are unknown (on a GPU, an assertion there, as nobody may wait).
        """
        matrix: Any = self.matrix
        if isinstance(classes, int):
            self._check(torch.tensor([classes]))
            return matrix[classes]
        if not classes.is_meta:
            classes = classes.to(matrix.device)  # rather than the other way, for which one would have to wait
        if classes.is_floating_point() and classes.dim() == 2:
            if classes.shape[1] != self.num_classes:
                raise ValueError(
                    f"The class gate has weights for {classes.shape[1]} classes, the adapter {self.num_classes}."
                )
            return classes @ matrix[:-1].to(classes)
        check_ids("The class gate", classes)
        classes = classes.long()  # torch takes bytes for masks
        self._check(classes)
        return matrix.to(classes.device)[classes]  # on the meta device, moved as well

    def _check(self, ids: Tensor) -> None:
        if ids.is_meta:
            return
        known: Any = self.known
        allowed = (ids >= 0) & (ids < len(known)) & known.to(ids.device)[ids.clamp(0, len(known) - 1)]
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            torch._assert_async(allowed.all(), "class labels that the KIND adapter does not know")
        elif not allowed.all():
            raise ValueError(
                f"The KIND adapter does not know the classes {sorted(set(ids[~allowed].tolist()))}, only "
                f"{int(known.sum()) - 1} of those below {self.num_classes}, and {self.num_classes}, the null class."
            )

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {self.num_units} units"


class Gate:
    """The classes of a batch.

    Args:
        classes: ids (B,), weights (B, C), or one class for a batch of any size.
        nulls: rows of the null class before them.
        explicit: whether `class_gate` gave it, rather than labels.
    """

    def __init__(self, classes: Tensor | int, nulls: int = 0, explicit: bool = False) -> None:
        self.classes, self.nulls, self.explicit = classes, nulls, explicit
        self.bound: list[tuple[nn.Module, Callable]] = []
        self._units: dict[ClassTable, Tensor] = {}
        self._kept: tuple | None = None

    def units(self, table: ClassTable) -> Tensor:
        """The units of an adapter that are open: (B, n), or (n,) for one class. ids are looked up once a forward."""
        soft = isinstance(self.classes, Tensor) and self.classes.is_floating_point()
        if soft or torch.compiler.is_compiling():  # weights may want gradients, which a checkpoint's first run has not
            return self._look_up(table)
        if table not in self._units:
            self._units[table] = self._look_up(table)
        return self._units[table]

    def of_rows(self, rows: list[int], size: int) -> "Gate":
        """The classes of these rows, in ascending order, of a batch of `size` samples."""
        if isinstance(self.classes, int):
            return self
        self.check_size(self.nulls + len(self.classes), size)
        own = [row - self.nulls for row in rows if row >= self.nulls]
        return Gate(self.classes[own], nulls=len(rows) - len(own), explicit=self.explicit)

    @staticmethod
    def check_size(rows: int, size: int) -> None:
        """Raise a ValueError unless there is a class for each sample of a batch."""
        if rows != size:
            raise ValueError(
                f"The class gate has {rows} rows, but this layer's batch has {size} samples: give a class for each "
                "(see num_images_per_prompt and guidance of class_gate)."
            )

    def project(self, x: Tensor, bank: nn.Module, v: Tensor, users: int) -> Tensor:
        """x V (..., r), once for all layers of a bank: q, k and v read the same x, one after the other.

        A gate rather than the bank keeps it, as that is gone when the forward is; and only until its last user.
        """
        if users == 1 or torch.compiler.is_compiling():  # a compiler finds what is computed twice
            return x @ v
        stamp = (torch.is_grad_enabled(), *(None if tensor.is_inference() else tensor._version for tensor in (x, v)))
        if self._kept is not None and self._kept[0] is bank and self._kept[1] is x and self._kept[2] == stamp:
            product, left = self._kept[3:]
        else:
            product, left = x @ v, users
        self._kept = (bank, x, stamp, product, left - 1) if left > 1 else None
        return product

    def _look_up(self, table: ClassTable) -> Tensor:
        units = table(self.classes)
        return torch.cat([units.new_zeros(self.nulls, units.shape[-1]), units]) if self.nulls else units


class GateState:
    """The gates of one model's forward passes in progress, the innermost last. It may be copied and pickled."""

    def __init__(self) -> None:
        self.stack: tuple[Gate, ...] = ()
        self.handles: list[RemovableHandle] = []
        self.place = 0  # of class_labels among the positional arguments
        self.warned = False  # of label dropout behind the gate's back

    @property
    def gate(self) -> Gate | None:
        return self.stack[-1] if self.stack else None

    def push(self, gate: Gate, model: nn.Module) -> None:
        self.stack = (*self.stack, gate)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for module in model.modules():
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and getattr(module, "gradient_checkpointing", False):
                    gate.bound.append((module, function))
                    module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                        _checkpoint, self, gate, function
                    )

    @contextmanager
    def pushed(self, gate: Gate) -> Iterator[None]:
        """Only for what is run now, without binding anything that runs later."""
        before = self.stack
        self.stack = (*before, gate)
        try:
            yield
        finally:
            self.stack = before

    def pop(self) -> None:
        for module, function in self.stack[-1].bound:
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
        self.stack = self.stack[:-1]


def _checkpoint(state: GateState, gate: Gate, function: Callable, block: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(partial(_run, state, gate, block), *args, **kwargs)


def _run(state: GateState, gate: Gate, block: Callable, *args: Any, **kwargs: Any) -> Any:
    with state.pushed(gate):
        return block(*args, **kwargs)


# Hooks. Module-level functions, which survive deepcopy and pickle.


def state_of(model: nn.Module) -> GateState:
    """The state of a model that has adapters of its own, made if it has none yet."""
    if not hasattr(model, STATE):
        setattr(model, STATE, GateState())
    return getattr(model, STATE)


def install(model: nn.Module) -> None:
    """Let a model push its own labels, if its forward has any."""
    state = state_of(model)
    parameters = list(signature(model.forward).parameters)
    if not state.handles and "class_labels" in parameters:
        state.place = parameters.index("class_labels")
        state.handles = [
            model.register_forward_pre_hook(_push_labels, with_kwargs=True),
            model.register_forward_hook(_pop_labels, always_call=True),
        ]


def remove(model: nn.Module) -> None:
    """Take the state and the hooks off a model that has no KIND adapter any more."""
    if hasattr(model, STATE):
        for handle in getattr(model, STATE).handles:
            handle.remove()
        delattr(model, STATE)


def _push_labels(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not any(isinstance(config, KINDConfig) for config in getattr(model, "peft_config", {}).values()):
        return remove(model)  # diffusers' and transformers' own ways to unload ask no tuner
    state = getattr(model, STATE)
    while state.stack and not state.stack[-1].explicit:
        state.pop()  # left by a KeyboardInterrupt, after which torch runs no hooks
    labels = kwargs.get("class_labels")
    if labels is None and len(args) > state.place:
        labels = args[state.place]
    if isinstance(labels, Tensor) and not torch.compiler.is_compiling():
        _check_labels(model, labels, next((value for value in (*args, *kwargs.values()) if value is not None), None))
    if state.stack:
        return None
    if labels is not None:
        if model.training and torch.is_grad_enabled() and not state.warned and not torch.compiler.is_compiling():
            _warn_of_label_dropout(state, model)
        state.push(Gate(labels), model)
    return None


def _check_labels(model: nn.Module, labels: Tensor, batch: Any) -> None:
    """Raise a ValueError for labels that the model's own embedders, which come before any gate, could not look up.

    Args:
        batch: the model's first input.
    """
    if labels.dim() and isinstance(batch, Tensor) and batch.dim() and len(labels) not in (1, len(batch)):
        raise ValueError(f"class_labels has {len(labels)} labels, but the batch has {len(batch)} samples.")
    tables = [module.embedding_table for module in model.modules() if isinstance(module, LabelEmbedding)]
    tables += [table for table in [getattr(model, "class_embedding", None)] if isinstance(table, nn.Embedding)]
    if not tables or labels.is_meta:
        return
    check_ids("class_labels", labels)
    most = min(table.num_embeddings for table in tables)
    allowed = (labels >= 0) & (labels < most)
    message = f"{type(model).__name__} has no such class_labels"
    if labels.device.type != "cpu":  # nobody may wait for it
        torch._assert_async(allowed.all(), message)
    elif not allowed.all():
        wrong = sorted(set(labels[~allowed].tolist()))
        raise ValueError(f"{message}: {wrong}, only 0 to {most - 1}, the null class's included.")


def _warn_of_label_dropout(state: GateState, model: nn.Module) -> None:
    state.warned = True
    if any(isinstance(module, LabelEmbedding) and module.dropout_prob > 0 for module in model.modules()):
        warnings.warn(
            f"{type(model).__name__} trains with label dropout of its own, drawn anew in every block, which the class "
            "gate does not see: tailors stay open where a label is dropped. Switch it off by diffusers_learngene."
            "anatomy.dit.disable_label_dropout_(model), and drop labels in the loss by drop_labels.",
            stacklevel=3,
        )


def _pop_labels(model: nn.Module, args: tuple, output: Any) -> None:
    state = getattr(model, STATE, None)
    if state is not None and state.stack and not state.stack[-1].explicit:
        state.pop()


# By hand


@contextmanager
def class_gate(
    model: nn.Module,
    classes: Tensor | Sequence[int] | int,
    *,
    num_images_per_prompt: int = 1,
    guidance: bool = False,
) -> Iterator[None]:
    """Say which classes a model's batches have, while the context is open.

        with class_gate(pipe.transformer, [3, 3, 7], num_images_per_prompt=2, guidance=True):
            pipe(prompts, num_images_per_prompt=2)

    For models that are given no `class_labels`; it wins over labels where there are any. Gradient checkpointing as
    diffusers and transformers do it may run the backward pass outside; with any other, keep the context open for it.

    Args:
        model: with KIND adapters, wrapped and compiled or not.
        classes: an id for each sample, (B,); or weights of all classes for each, (B, num_classes), as a soft gate; or
            one id for all samples of batches of any size, with which adapters can be merged.
        num_images_per_prompt: how many samples in a row each row stands for.
        guidance: whether as many rows of the null class come before, as in the batches of classifier-free guidance.

    Raises:
        ValueError: the model has no KIND adapter, or no gate can be made of the classes.
    """
    gates: list[Any] = [getattr(layer, "gate", None) for layer in model.modules()]
    states = dict.fromkeys(gate for gate in gates if isinstance(gate, GateState))
    if not states:
        raise ValueError(f"{type(model).__name__} has no KIND adapter for a gate to open.")
    with ExitStack() as stack:
        for state in states:
            state.push(_explicit_gate(classes, num_images_per_prompt, guidance), model)
            stack.callback(state.pop)
        yield


def _explicit_gate(classes: Tensor | Sequence[int] | int, num_images_per_prompt: int, guidance: bool) -> Gate:
    check_integer("num_images_per_prompt", num_images_per_prompt)
    if isinstance(classes, int) and not isinstance(classes, bool):
        if guidance:
            raise ValueError(f"guidance=True and the one class {classes} do not say how many rows: give ids (B,).")
        return Gate(classes, explicit=True)
    try:
        rows = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:  # words, None, lists of several lengths
        raise ValueError(f"A class gate of {classes!r} is none: {error}.") from error
    if not (rows.dim() == 2 and rows.is_floating_point()):
        check_ids("A class gate", rows, dims=(1,))
    rows = rows.repeat_interleave(num_images_per_prompt, dim=0)
    return Gate(rows, nulls=len(rows) if guidance else 0, explicit=True)
