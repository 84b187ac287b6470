"""What mypyc compiles is as it can compile it. `make test-compiled` runs the tests of the result."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

from pioneer_tunnel._compiled import COMPILED

ROOT: Final = Path(__file__).parent.parent
BUILD: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
MODULES: Final[list[str]] = [path.removeprefix("/") for path in BUILD["hooks"]["mypyc"]["include"]]
WITH_COROUTINES: Final = {"pioneer_tunnel/exchange/task_leg.py"}
"""Trio wraps coroutines that have no frames when it makes tasks of them, and these are nothing else."""
PURE: Final = {"len", "min", "max"}


def nodes(path: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / path).read_text()))


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def imported(path: str, nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What the names of a module are elsewhere: `module.name`."""
    package = dotted(path).split(".")
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = ".".join((*(package[: -node.level] if node.level else ()), *filter(None, [node.module])))
            found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return found


def test_there_are_all_modules_in_order() -> None:
    assert sorted(MODULES) == MODULES
    assert all((ROOT / path).is_file() for path in MODULES)


def test_this_run_is_of_what_it_should_be() -> None:
    assert any(ROOT.glob("*__mypyc.*")) == COMPILED


@pytest.mark.parametrize("path", MODULES)
def test_there_are_no_coroutines(path: str) -> None:
    """Trio looks into the frames of coroutines, for KeyboardInterrupt among other things."""
    found = any(isinstance(node, ast.AsyncFunctionDef) for node in nodes(path))
    assert found == (path in WITH_COROUTINES)


@pytest.mark.parametrize("path", MODULES)
def test_the_borders_of_slices_have_no_effects(path: str) -> None:
    """mypyc 2.4 evaluates them twice unless it knows the type: what `os.write` was called for was written twice."""
    for node in nodes(path):
        if isinstance(node, ast.Slice):
            calls = [inner for border in ast.iter_child_nodes(node) for inner in ast.walk(border)]
            assert {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)} <= PURE, ast.unparse(node)


def test_no_class_in_python_inherits_from_a_compiled_one() -> None:
    compiled = {
        f"{dotted(path)}.{node.name}" for path in MODULES for node in nodes(path) if isinstance(node, ast.ClassDef)
    }
    for file in (ROOT / "pioneer_tunnel").rglob("*.py"):
        path = str(file.relative_to(ROOT))
        if path not in MODULES:
            found = [*nodes(path)]
            names = imported(path, found)
            bases = {
                base.id
                for node in found
                if isinstance(node, ast.ClassDef)
                for base in node.bases
                if isinstance(base, ast.Name)
            }
            assert not {names.get(base) for base in bases} & compiled, path
