# SPDX-License-Identifier: Apache-2.0
"""Finds the repeated blocks of any diffusers / transformers model, the roles in them, and the groups that share.

    stack     a list of blocks that repeat: an outermost ModuleList / Sequential of which two children of one class
              have half of their matrices or more in common, by role and shape (DiT has one stack, Flux two, Lumina2
              three, Swin one a stage)
    matrix    a weight that is one matrix: nn.Linear, transformers' Conv1D, 1x1 nn.Conv2d
    role      the path of a matrix inside its block ("attn1.to_q")
    group     the matrices that share one bank: one role and shape over the layers of a stack. q, k and v are rows of
              one fused matrix (the papers write one qkv matrix; diffusers splits it), so they share a bank

Everything is read off the modules, never off a list of architectures. What a block shares with all others (DiT's
embedders once tied) and what belongs to an embedder is not a matrix of the block.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D


QKV_FAMILIES = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


# torch reads the weights of its fused attention, and of its fused layer when not in training, past the modules;
# PEFT's wrapper holds several copies of one module.
_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, AuxiliaryTrainingWrapper)


# How a layer stores its matrix: as (out, in), as its transpose, or as (out, in, 1, 1).
Form = Literal["rows", "columns", "pointwise"]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: its module path, its place (stack "" and layer 0 if in no stack), and its shape (out, in)."""

    name: str
    stack: str
    layer: int
    role: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Matrices that share one bank, ordered by layer; `key` names the group independently of depth and width."""

    key: str
    matrices: tuple[Matrix, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes that one layer brings to the group (three for fused q, k, v)."""
        first = self.matrices[0].layer
        return [matrix.shape for matrix in self.matrices if matrix.layer == first]

    @property
    def offsets(self) -> list[int]:
        """Of every matrix, the rows before it in the fused matrix of its layer."""
        rows = [0, *accumulate(m1 for m1, _ in self.shapes)]
        return rows[:-1] * self.num_layers

    @property
    def num_layers(self) -> int:
        return len({matrix.layer for matrix in self.matrices})


def unwrap(module: nn.Module) -> nn.Module:
    """The layer below PEFT wrappers."""
    while isinstance(below := getattr(module, "base_layer", None), nn.Module):
        module = below
    return module


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer whose weight is one matrix, seen through PEFT wrappers; None for every other module."""
    module = unwrap(module)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.out_channels, module.in_channels
    if hasattr(module, "qweight") or hasattr(module, "W_q"):  # quantised by GPTQ, AWQ, HQQ, ...: not an nn.Linear
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return None


def form_of(module: nn.Module) -> Form:
    """How a layer stores its matrix, seen through PEFT wrappers."""
    module = unwrap(module)
    return "columns" if isinstance(module, Conv1D) else "pointwise" if isinstance(module, nn.Conv2d) else "rows"


def weight_to_matrix(weight: Tensor, form: Form) -> Tensor:
    """A stored weight as (..., out, in)."""
    if form == "columns":
        return weight.transpose(-1, -2)
    return weight.flatten(-3) if form == "pointwise" else weight


def matrix_to_weight(matrix: Tensor, form: Form) -> Tensor:
    """The inverse of `weight_to_matrix`."""
    if form == "columns":
        return matrix.transpose(-1, -2)
    return matrix[..., None, None] if form == "pointwise" else matrix


def find_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of repeated blocks by module path; empty if the model has none."""
    stacks: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList | nn.Sequential) and _repeats(child):
                stacks[here] = child
            else:
                visit(child, here)

    visit(model, "")
    return stacks


def lists_beside(model: nn.Module, stacks: Collection[str]) -> dict[str, int]:
    """The outermost lists of modules or parameters that neither are, hold, nor lie in a stack: lengths by path."""
    lists: dict[str, int] = {}
    kinds = (nn.ModuleList, nn.ParameterList)
    for path, module in model.named_modules():
        apart = not any(f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in stacks)
        listed = isinstance(module, kinds) and not isinstance(module, ParametrizationList)  # weight norm's is none
        if listed and apart and not path.startswith(tuple(f"{other}." for other in lists)):
            lists[path] = len(module)
    return lists


def _repeats(blocks: nn.Module) -> bool:
    seen: dict[type, set[frozenset]] = {}
    for block in blocks.children():
        own = frozenset(_block_matrices(block)) if matrix_shape(block) is None else frozenset()
        others = seen.setdefault(type(block), set())
        if own and any(2 * len(own & other) >= min(len(own), len(other)) for other in others):
            return True
        if own:
            others.add(own)
    return False


def _block_matrices(block: nn.Module, path: str = "") -> list[tuple[str, tuple[int, int]]]:
    """(role, shape) of the matrices below a block, in order, without embedders and `_OPAQUE`."""
    found = []
    for name, child in block.named_children() if not isinstance(block, _OPAQUE) else ():
        role = f"{path}.{name}" if path else name
        shape = matrix_shape(child)
        if shape is not None:
            found.append((role, shape))
        elif not type(child).__module__.endswith("embeddings"):
            found += _block_matrices(child, role)
    return found


def find_matrices(model: nn.Module, stacks: Mapping[str, nn.Module]) -> list[Matrix]:
    """Every matrix that belongs to one block of one stack, in module order."""
    owners = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return [
        Matrix(f"{stack}.{layer}.{role}", stack, int(layer), role, shape)
        for stack, blocks in stacks.items()
        for layer, block in blocks.named_children()
        for role, shape in _block_matrices(block)
        if owners[id(unwrap(block.get_submodule(role)))] == owners[id(block)]
    ]


def named_matrices(model: nn.Module, stacks: Iterable[str], names: Iterable[str]) -> list[Matrix]:
    """Of the modules of these names, those whose weight is one matrix, wherever they lie."""
    pattern = re.compile(f"({'|'.join(map(re.escape, stacks)) or '(?!)'})\\.(\\d+)\\.(.+)")
    matrices = []
    for name in names:
        shape = matrix_shape(model.get_submodule(name))
        if shape is not None:
            match = pattern.fullmatch(name)
            stack, layer, role = (match[1], int(match[2]), match[3]) if match else ("", 0, name)
            matrices.append(Matrix(name, stack, layer, role, shape))
    return matrices


def group_matrices(matrices: Iterable[Matrix], share_qkv: bool = True) -> list[Group]:
    """Group by (role, shape) over the layers of each stack; q, k, v of one attention with one input width join.

    A role that comes in several shapes (the last block of SD3) makes several groups: "...norm1.linear", "...#2".
    """
    siblings: dict[tuple, list[Matrix]] = {}
    for matrix in matrices:
        parent, _, leaf = matrix.role.rpartition(".")
        family = next((i for i, names in enumerate(QKV_FAMILIES) if leaf in names and share_qkv), None)
        fused = (parent, family, matrix.shape[1]) if family is not None else matrix.role
        siblings.setdefault((matrix.stack, matrix.layer, fused), []).append(matrix)

    groups: dict[tuple, list[Matrix]] = {}
    for unit in siblings.values():
        kind = (unit[0].stack, tuple((matrix.role, matrix.shape) for matrix in unit))
        groups.setdefault(kind, []).extend(unit)

    keys: Counter = Counter()
    result = []
    for (stack, roles), members in groups.items():
        parent = roles[0][0].rpartition(".")[0]
        role = "+".join([roles[0][0]] + [name.removeprefix(f"{parent}." if parent else "") for name, _ in roles[1:]])
        key = f"{stack}.*.{role}" if stack else role
        keys[key] += 1
        result.append(Group(key if keys[key] == 1 else f"{key}#{keys[key]}", tuple(members)))
    return result


def target_names(model: nn.Module, matrices: Sequence[Matrix]) -> list[str]:
    """Names that match just these: roles ("attn1.to_q") where nothing else in the model ends so, else full paths."""
    names = [matrix.name for matrix in matrices]
    roles = list(dict.fromkeys(matrix.role for matrix in matrices))
    endings = tuple("." + role for role in roles)
    matched = {name for name, _ in model.named_modules() if name in roles or name.endswith(endings)}
    return roles if matched == set(names) else names
