"""The rooms that hold a protocol do no I/O: they import neither Trio nor anything else that waits, moves or tells time.

What a module imports is read from its source, with everything of ours that it imports in turn: importing it would run
the packages' `__init__`, and those do import Trio, as they hand out the Trio side too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "pioneer_tunnel"

TRIO_SIDE: Final = {"yamux/__init__.py", "yamux/connection.py", "yamux/stream.py"}
SANS_IO: Final = sorted(
    {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "yamux").glob("*.py")} - TRIO_SIDE
    | {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("_http/*.py")}
    | {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("_wire/*.py")}
    | {
        "_model/addresses.py",
        "_model/keys.py",
        "_net/tls/client_hello.py",
        "relay/gateways/takeover.py",
        "relay/rates.py",
        "tunnel/restart_policy.py",
    }
)

IO: Final = {"anyio", "asyncio", "queue", "select", "selectors", "ssl", "subprocess", "threading", "time", "trio"}

ENUMERATIONS: Final = {
    ("pioneer_tunnel._model.errors", "pioneer_tunnel._model.status"): {"ErrorKind"},
    ("pioneer_tunnel._http.head", "pioneer_tunnel._model.status"): {"clean_message"},
}
"""Imports that are not followed, and the names that they may take: an error knows its kind, an answer is cleaned like a
status, and what a status is for the wire stands beside the feed of them, which does wait."""


def file_of(module: str) -> Path | None:
    """The file of a module of ours."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, set[str]]]:
    """The modules that a file imports anywhere in it, and the names that it takes from each."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, set()
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {alias.name for alias in node.names}
            submodules = {name for name in names if file_of(f"{module}.{name}")}
            for name in submodules:
                yield f"{module}.{name}", set()
            if names - submodules:
                yield module, names - submodules


def reached(path: Path) -> dict[str, str]:
    """Every module that `path` imports, by whatever way, and by which module of ours."""
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        for module, names in imports(current):
            allowed = ENUMERATIONS.get((module_of(current), module))
            if module in found or (allowed is not None and names <= allowed):
                continue
            found[module] = module_of(current)
            if module.startswith("pioneer_tunnel"):
                ours = file_of(module)
                assert ours is not None, f"{module_of(current)} imports {module}, which is not there"
                waiting.append(ours)
    return found


@pytest.mark.parametrize("room", SANS_IO)
def test_it_imports_nothing_that_does_io(room: str) -> None:
    found = reached(PACKAGE / room)
    assert {module: by for module, by in found.items() if module.split(".")[0] in IO} == {}


def test_the_protocol_of_yamux_is_among_them() -> None:
    assert {f"yamux/{room}.py" for room in ("frames", "flow", "outbox", "session")} <= set(SANS_IO)


@pytest.mark.parametrize("room", sorted(TRIO_SIDE | {"_net/link.py", "_net/streams.py"}))
def test_where_trio_is_imported_it_is_found(room: str) -> None:
    """The test above would say so."""
    assert "trio" in reached(PACKAGE / room)
