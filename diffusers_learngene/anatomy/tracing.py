# SPDX-License-Identifier: Apache-2.0
"""Follows what the forward of one block computes, without computing it.

The forward runs on a copy of the block in which every tensor is a `Traced`: a value without numbers, which answers
every torch function with another one and remembers where it comes from. The modules, their configs and the Python
code are real, so that whatever an architecture decides by its config is decided as it will be. No number is read, no
weight is copied, no random number is drawn, and a block of any size takes milliseconds.

What code may ask of a tensor and cannot be known is answered by what is usual: three axes (batch, tokens, channels),
float32, a length of one, and False for every comparison. Where that ends in an error, the last answer that can be
another one (of axes, lengths and comparisons) is changed, as in a search for the way out of a maze.
"""

import copy
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nodes import Node, Trace, TracingError, flat, nodes_in, words


_RUNS = (4, 40)  # of one forward with the same inputs: mostly it is others that it wants
_FACTS: dict[str, Any] = {
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "requires_grad": False,
    "grad": None,
    "is_quantized": False,
    **dict.fromkeys(("is_cuda", "is_mps", "is_meta", "is_sparse", "is_nested"), False),
}
_ANSWERS: dict[str, Any] = {"is_floating_point": True, "is_complex": False}
_AXES = (3, 1, 2, 4)
_FACTORIES = words(
    "arange as_tensor empty empty_strided eye full linspace normal ones rand randint randn randperm tensor zeros"
)


def trace(block: nn.Module) -> Trace:
    """Follow the forward of a block; the block itself is not touched.

    Raises:
        TracingError: the forward cannot be followed.
    """
    error: Exception | None = None
    recorder = _Recorder(block)
    for runs in _RUNS:
        for given in _inputs(block):
            answers: list[tuple[int, ...]] = []
            for _ in range(runs):
                try:
                    outputs = recorder.run(given, answers)
                    return Trace(outputs, frozenset(recorder.read_outside))
                except Exception as raised:  # of whatever kind: it is the block's own code
                    error = error or raised
                answers = _next_way(recorder.answers)
                if not answers:
                    break
    raise TracingError(f"its forward cannot be followed ({error!r})") from error


def _inputs(block: nn.Module) -> Iterator[dict[str, Any]]:
    """Parameters of a forward, each with whether it is a tensor (True) or what else it is given: all that may be
    tensors, also those that may be tuples, those that are annotated as tensors, those without a default, and these
    without one. (Others keep their defaults; caches are objects; words are None, dicts of further arguments empty.)
    """
    parameters = inspect.signature(block.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    given: dict[str, Any] = {p.name: {} for p in named if p.name.endswith("kwargs") and p.default in (p.empty, None)}
    named = [p for p in named if p.name not in given]
    needed: dict[str, Any] = {p.name: None if _is_word(p) else True for p in named if p.default is p.empty}
    optional = [p for p in named if p.default is None and not _is_word(p)]
    annotated = dict.fromkeys((p.name for p in optional if "Tensor" in str(p.annotation)), True)
    tuples = dict.fromkeys((p.name for p in optional if "tuple" in str(p.annotation).lower()), True)
    bare = [p.name for p in optional if p.annotation is p.empty and "past" not in p.name and "cache" not in p.name]
    ways = [needed | annotated | dict.fromkeys(bare, True), needed | annotated | tuples, needed | annotated, needed]
    ways += [needed | tuples, *({**needed, name: None} for name in list(needed)[1:])]
    yield from (given | way for index, way in enumerate(ways) if way not in ways[:index])


def _is_word(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a string, by its annotation."""
    return "str" in str(parameter.annotation) and "Tensor" not in str(parameter.annotation)


def _next_way(answers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The next answers to try: those so far, up to the last that has alternatives, of which it is the next."""
    while answers and len(answers[-1]) == 1:
        answers.pop()
    return [*answers[:-1], answers[-1][1:]] if answers else []


class _Recorder(TorchFunctionMode):
    """Runs a copy of a block on `Traced` values, with which it answers torch functions."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        tensors = dict([*block.named_parameters(), *block.named_buffers()])
        self._leaves = {name: Traced(self, Node("tensor", name=name)) for name in tensors}
        copied = copy.deepcopy(block, {id(tensor): self._leaves[name] for name, tensor in tensors.items()})
        self._block = copied.eval()
        for path, module in self._block.named_modules():
            module.forward = self._noticed(path, module.forward)

    def run(self, given: dict[str, Any], answers: list[tuple[int, ...]]) -> list[Node]:
        """The outputs of the block for these inputs (`_inputs`).

        Args:
            answers: to the first questions, each with the alternatives that are left; grows by those that are asked.
        """
        self.answers, self._asked = answers, 0
        self.read_outside: set[str] = set()
        self._running: list[str] = []  # the modules whose forward runs, innermost last
        for name, leaf in self._leaves.items():
            leaf.node = Node("tensor", name=name)
        arguments = {
            name: Traced(self, Node("input", name=name)) if value is True else value for name, value in given.items()
        }
        with torch.no_grad(), self:
            return list(nodes_in(_described(self._block.forward(**arguments))))

    def _noticed(self, path: str, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def running(*args: Any, **kwargs: Any) -> Any:
            self._running.append(path)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        return running

    def decide(self, *options: int) -> int:
        if self._asked == len(self.answers):
            self.answers.append(options)
        self._asked += 1
        return self.answers[self._asked - 1][0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _FACTORIES and not any(isinstance(value, Traced) for value in flat((args, kwargs))):
            return func(*args, **(kwargs or {}))
        return self.record(name, *args, **(kwargs or {}))

    def record(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in _ANSWERS:
            return _ANSWERS[name]
        if name in ("ndim", "dim", "ndimension"):
            return self.decide(*_AXES)
        changed = args[0] if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Traced) else None
        op = name.strip("_") if name.startswith("__") or changed is not None else name
        if name.startswith("__r") and op[1:] in _REFLECTED:
            op, args = op[1:], args[::-1]
        op = "new_tensor" if op == "tensor" else op  # "tensor" is a leaf
        if name == "__setitem__":
            changed = args[0]
        node = Node(op, _described(args), _described(kwargs))
        for read in node.inputs():
            owner = read.name.rpartition(".")[0]
            if read.op == "tensor" and owner not in self._running[-1:]:
                self.read_outside.add(owner)
        if changed is not None:
            changed.node = node
            return changed
        counted = op in _COUNTS or (op in _ARITHMETIC and _all_lengths(args))
        result = Length(self, node) if counted else Traced(self, node)
        count = args[1] if op == "chunk" and len(args) > 1 else kwargs.get("chunks")
        return tuple(result[index] for index in range(count)) if type(count) is int else result


class Traced:
    """A tensor without numbers.

    It is no `torch.Tensor`, and must not claim to be one: torch's own code would look for its memory.
    """

    def __init__(self, recorder: _Recorder, node: Node) -> None:
        self.recorder, self.node = recorder, node

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = next(value for value in flat((args, kwargs)) if isinstance(value, Traced))
        return value.recorder.__torch_function__(func, types, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return _FACTS[name]
        if name in ("values", "indices"):  # of what torch.max, sort, ... return; a Tensor's own are of sparse ones
            return self[name]
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        method = callable(getattr(Tensor, name))
        return functools.partial(self.recorder.record, name, self) if method else self.recorder.record(name, self)

    def __iter__(self) -> Iterator["Traced"]:
        count = _unpacked(sys._getframe(1).f_code).get(sys._getframe(1).f_lasti)
        return iter([self[index] for index in range(count or self.recorder.decide(1, 2, 3))])

    def __bool__(self) -> bool:
        return bool(self.recorder.decide(False, True))

    def __contains__(self, _: object) -> bool:
        return bool(self)

    def __len__(self) -> int:
        return self.recorder.decide(*_AXES)

    def __index__(self) -> int:
        return 1

    __int__ = __index__

    def __float__(self) -> float:
        return 1.0

    def __format__(self, _: str) -> str:
        return "?"

    def __getitem__(self, key: Any) -> "Traced":
        return self.recorder.record("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.recorder.record("__setitem__", self, key, value)

    __hash__ = object.__hash__


class Length(Traced, int):
    """What code reads off a shape, or makes of that: a whole number, which torch takes for one when making tensors."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # or torch takes it for a tensor

    def __new__(cls, *_: Any) -> "Length":
        return int.__new__(cls, 1)


_COUNTS = words("shape size numel nelement stride")
_ARITHMETIC = words("getitem add sub mul floordiv mod neg pow")


def _all_lengths(args: tuple) -> bool:
    """Whether arithmetic is one of lengths and numbers alone."""
    first, *others = args
    return isinstance(first, Length) and all(isinstance(other, int | slice | tuple | list) for other in others)


_REFLECTED = words("add sub mul truediv floordiv matmul pow mod and or xor")


def _operator(name: str) -> Callable:
    return lambda self, *args: self.recorder.record(name, self, *args)


for _name in (*_REFLECTED, *(f"r{_name}" for _name in _REFLECTED), *words("eq ne lt le gt ge neg abs invert")):
    setattr(Traced, f"__{_name}__", _operator(f"__{_name}__"))


@functools.cache
def _unpacked(code: CodeType) -> dict[int, int]:
    """How many values each instruction of a function unpacks, by its place: `a, b = x` asks x for two."""
    counts = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname == "UNPACK_SEQUENCE":
            counts[instruction.offset] = instruction.argval
        elif instruction.opname == "UNPACK_EX":  # a, *b, c = x
            counts[instruction.offset] = (instruction.argval & 0xFF) + (instruction.argval >> 8) + 1
    return counts


def _described(value: Any) -> Any:
    """A value of a forward with nodes for what is traced."""
    if isinstance(value, Traced):
        return value.node
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if type(value) is slice:
        return _described((value.start, value.stop, value.step))
    return tuple(_described(item) for item in value) if isinstance(value, list | tuple) else value
