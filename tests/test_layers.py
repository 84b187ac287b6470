"""A folder of the package imports only the folders below it. docs/ and CONTRIBUTING.md have the same list as a map."""

from __future__ import annotations

from typing import Final

import pytest
from source_imports import PACKAGE, imports, module_of

_BOTTOM: Final = {"_version", "_model", "_storage"}
_STREAMS: Final = {"_model", "_storage", "_net"}
_MUX: Final = _STREAMS | {
    "_version", "_deprecation", "_async_library", "_wire", "yamux", "websocket", "resume", "exchange"
}  # fmt: skip
_TUNNEL: Final = _MUX | {"_http", "access", "access_log", "certificates", "transports", "tunnel"}
_FACES: Final = _TUNNEL | {"gateway", "_hosts"}

ALLOWED: Final[dict[str, set[str]]] = {
    "_version": set(),
    "_deprecation": set(),
    "_async_library": set(),
    "_model": set(),
    "_storage": {"_model"},
    "_wire": {"_version", "_model"},
    "_http": {"_model"},
    "access": {"_model", "_storage", "_http"},
    "access_log": {"_model", "_storage", "_http"},
    "_net": _BOTTOM,
    "certificates": _STREAMS | {"_version"},
    "monitoring": _STREAMS | {"_version", "_async_library"},
    "yamux": _STREAMS,
    "websocket": _STREAMS,
    "resume": _STREAMS | {"_wire", "websocket"},
    "exchange": _STREAMS,
    "transports": _MUX,
    "tunnel": _MUX | {"transports", "_http", "access", "access_log", "certificates"},
    "_control": _STREAMS | {"_wire"},
    "gateway": _TUNNEL | {"_control", "monitoring"},
    "asgi": _TUNNEL,
    "diagnosis": _TUNNEL | {"gateway"},
    "_hosts": _TUNNEL | {"gateway"},
    "aio": _FACES | {"asgi"},
    "blocking": _FACES,
    "relay": _MUX | {"_http", "access", "access_log", "certificates", "monitoring", "_control"},
}
"""For each folder, what it may import. What is not here (the package's `__init__`, `cli`, `testing`) may import all."""


@pytest.mark.parametrize("folder", ALLOWED)
def test_it_imports_only_what_is_below_it(folder: str) -> None:
    files = sorted(PACKAGE.glob(f"{folder}.py")) + sorted(PACKAGE.glob(f"{folder}/**/*.py"))
    assert files
    wrong = [
        f"{module_of(file)} imports {module}"
        for file in files
        for module in imports(file)
        if module.startswith("pioneer_tunnel") and module.split(".")[1] not in {folder, *ALLOWED[folder]}
    ]
    assert wrong == []


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders - {"cli", "testing"} == ALLOWED.keys() - {"_version", "_deprecation", "_async_library"}


BELOW_THE_FLEET: Final = ("gateways", "visitors")
"""Folders of the relay that know nothing of other nodes."""


@pytest.mark.parametrize("folder", BELOW_THE_FLEET)
def test_a_relay_of_its_own_knows_no_fleet(folder: str) -> None:
    wrong = [
        f"{module_of(file)} imports {module}"
        for file in sorted((PACKAGE / "relay" / folder).glob("**/*.py"))
        for module in imports(file)
        if module.startswith(("pioneer_tunnel.relay.fleet", "pioneer_tunnel.relay.workers"))
    ]
    assert wrong == []


def test_the_fleet_knows_no_workers() -> None:
    files = sorted((PACKAGE / "relay" / "fleet").glob("*.py"))
    assert files
    wrong = [module_of(file) for file in files if any("relay.workers" in module for module in imports(file))]
    assert wrong == []
