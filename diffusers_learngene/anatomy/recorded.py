# SPDX-License-Identifier: Apache-2.0
"""Follows what the forward of a block computes, by watching one real call: where following it without numbers fails.

The model runs once on whatever inputs it is given, which may be tiny, or on the meta device. While one of the blocks
runs that are asked for, every torch function that it calls is noted down: the same `tracing.Trace`, of the way that
its code really takes.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nodes import Node, Trace, flat


@torch.no_grad()
def recorded_traces(model: nn.Module, inputs: Mapping[str, Any], paths: Collection[str]) -> dict[str, Trace]:
    """What the blocks of these paths do when they are first called, in one call of the model, in eval mode.

    Blocks that are not called are left out. Errors of the model come as they are.
    """
    watches = {path: _Watch(model.get_submodule(path)) for path in paths}
    with _eval_mode(model), ExitStack() as open_watches:
        for watch in watches.values():
            open_watches.enter_context(watch)
        model(**inputs)
    return {path: watch.trace for path, watch in watches.items() if watch.trace}


class _Watch:
    """Inside, the first call of a block is noted down, as `trace`."""

    def __init__(self, block: nn.Module) -> None:
        self.trace: Trace | None = None
        self._block, self._call = block, ExitStack()

    def __enter__(self) -> None:
        self._hooks = [
            self._block.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._block.register_forward_hook(self._end),
        ]

    def __exit__(self, *_: object) -> None:
        self._call.close()
        for hook in self._hooks:
            hook.remove()

    def _begin(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.trace is None:
            self._recorder = _Recorder(block, (args, kwargs))
            self._call.enter_context(self._recorder.watching(block))

    def _end(self, _: nn.Module, __: tuple, returned: Any) -> None:
        if self.trace is None:
            self._call.close()
            nodes = self._recorder.nodes
            outputs = [nodes[id(value)] for value in flat(returned) if id(value) in nodes]
            self.trace = Trace(outputs, frozenset(self._recorder.read_outside))
            del self._recorder  # and the tensors that it kept


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class _Recorder(TorchFunctionMode):
    """Notes down every torch function between tensors; `nodes` are those of the tensors, by id."""

    def __init__(self, block: nn.Module, call: tuple[tuple, dict[str, Any]]) -> None:
        super().__init__()
        self.nodes: dict[int, Node] = {}
        self.read_outside: set[str] = set()
        self._running: list[str] = []  # the modules whose forward runs, innermost last
        self._kept: list[object] = []  # or an id would come again
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            self._keep(tensor, Node("tensor", name=name))
        for value in flat(call):
            if isinstance(value, Tensor) and id(value) not in self.nodes:
                self._keep(value, Node("input"))

    def _keep(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self._kept.append(tensor)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Inside, what runs is noted down, and which module is running."""
        handles = []
        self._running.append("")  # the block itself, whose own hooks are running already
        for path, module in block.named_modules():
            if module is block:
                continue
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._running.append(path)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, *_: Any) -> None:
        self._running.pop()  # (what a hook returns would be the module's output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name_of(func)
        made = [value for value in flat(result) if isinstance(value, Tensor)]
        changed = args[0] if name.endswith("_") and not name.startswith("__") or name == "__setitem__" else None
        if not made and changed is None:
            return result
        node = Node(name.strip("_"), self._described(args), self._described(kwargs))
        for read in node.inputs():
            owner = read.name.rpartition(".")[0]
            if read.op == "tensor" and owner not in self._running[-1:]:
                self.read_outside.add(owner)
        if isinstance(changed, Tensor):
            self._keep(changed, node)
        elif isinstance(result, Tensor):
            if id(result) not in self.nodes or result is not next(iter(args), None):  # .to() may give the same
                self._keep(result, node)
        else:
            for index, value in enumerate(made):
                self._keep(value, Node("getitem", (node, index)))
        return result

    def _described(self, value: Any) -> Any:
        """A value of a forward with nodes for its tensors."""
        if isinstance(value, Tensor):
            return self.nodes.get(id(value), Node("constant"))
        if isinstance(value, dict):
            return {key: self._described(item) for key, item in value.items()}
        return tuple(self._described(item) for item in value) if isinstance(value, list | tuple) else value


def _name_of(func: Any) -> str:
    """The name of a torch function, or of the attribute of a tensor that is read."""
    name = getattr(func, "__name__", str(func))
    name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
    return "new_tensor" if name == "tensor" else name  # "tensor" is a leaf
