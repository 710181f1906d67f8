# SPDX-License-Identifier: Apache-2.0
"""The plan of the house: rooms, floors, and arrows that point down; the README's table is the rule."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_learngene"
FILES = sorted(PACKAGE.rglob("*.py"))
ROW = re.compile(r"^\| (\d) \| `diffusers_learngene/([a-z_/.]+)` \| .+ \|$", re.MULTILINE)
FLOORS = {room.rstrip("/"): int(floor) for floor, room in ROW.findall((ROOT / "README.md").read_text("utf-8"))}


def room(path: Path) -> str:
    """The first folder below the package, or a file that lies loose in it."""
    return path.relative_to(PACKAGE).parts[0]


def folder(path: Path) -> Path:
    """Where a file lies; one that lies loose in the package is a folder of its own."""
    return path if path.parent == PACKAGE else path.parent


def imported(path: Path) -> set[Path]:
    """The files of the package that a file names in its imports, wherever they stand in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = path.parents[node.level - 1]
            base = above.joinpath(*node.module.split(".")) if node.module else above
            for alias in node.names:
                found.add(next((f for f in _files(base / alias.name) if f.exists()), None) or _file(base))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(name.split(".")[0] == PACKAGE.name for name in names), f"{path}: import it relatively"
        elif isinstance(node, ast.Dict) and path == PACKAGE / "__init__.py":  # what is imported when asked for
            values = [value.value for value in node.values if isinstance(value, ast.Constant)]
            found |= {_file(PACKAGE.joinpath(*value.strip(".").split("."))) for value in values}
    return found - {path}


def _files(base: Path) -> tuple[Path, Path]:
    return base.with_suffix(".py"), base / "__init__.py"


def _file(base: Path) -> Path:
    return next(f for f in _files(base) if f.exists())


IMPORTS = {path: imported(path) for path in FILES}


def test_the_readme_names_the_rooms_that_exist():
    loose = {path.name for path in PACKAGE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert FLOORS.keys() == loose | folders
    for name in re.findall(r"^\| above \| `([a-z_/.]+)`", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE):
        assert (ROOT / name).is_dir(), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    for target in IMPORTS[path]:
        if room(target) != room(path):
            assert FLOORS[room(target)] < FLOORS[room(path)], f"{path} imports {target}"


def test_no_circle():
    """Neither of files, nor of folders: an `__init__` that gathers names for its readers is of neither."""
    files = {path: IMPORTS[path] for path in FILES}
    folders: dict[Path, set[Path]] = {}
    for path, targets in files.items():
        if path.name != "__init__.py":
            others = {folder(target) for target in targets if target.name != "__init__.py"}
            folders.setdefault(folder(path), set()).update(others - {folder(path)})
    for graph in (files, folders):
        left = dict(graph)
        while free := [node for node, targets in left.items() if not targets & left.keys()]:
            for node in free:
                del left[node]
        assert not left, sorted(str(path.relative_to(PACKAGE)) for path in left)


def test_every_folder_says_what_lives_in_it():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE and room(path) != "metrics":
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
