"""Modules that hold a protocol do no I/O: they import neither Trio nor anything else that waits, moves or tells time.

Imports of our own modules are followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from source_imports import PACKAGE, file_of, imports, module_of

TRIO_SIDE: Final = {
    "yamux/__init__.py",
    "yamux/connection.py",
    "yamux/driver.py",
    "yamux/stream.py",
    "yamux/stream_leg.py",
    "_model/exception_groups.py",
}
SANS_IO: Final = sorted(
    {
        path.relative_to(PACKAGE).as_posix()
        for folder in ("_model", "_wire", "_http", "yamux")
        for path in PACKAGE.glob(f"{folder}/*.py")
    }
    - TRIO_SIDE
    | {
        "_net/fastpath/timers.py",
        "_net/leg.py",
        "_net/netlink.py",
        "_net/ways.py",
        "_net/proxies/choice.py",
        "_net/proxies/handshake.py",
        "_net/proxies/http_connect.py",
        "_net/proxies/socks5.py",
        "_net/tls/client_hello.py",
        "relay/gateways/takeover.py",
        "resume/tail.py",
        "relay/rates.py",
        "relay/visitors/forwarded_for.py",
        "access/attempts.py",
        "access/htpasswd.py",
        "access/requests.py",
        "access/tokens.py",
        "tunnel/restart_policy.py",
    }
    | {
        f"asgi/{name}.py"
        for name in ("exchange", "http1", "interface", "lifespan", "options", "scope", "websocket", "worker")
    }
)

IO: Final = {"anyio", "asyncio", "queue", "select", "selectors", "ssl", "subprocess", "threading", "time", "trio"}


def reached(path: Path) -> dict[str, str]:
    """Every module that `path` imports, directly or not, with the module of ours that imports it."""
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        for module in imports(current):
            if module in found:
                continue
            found[module] = module_of(current)
            ours = file_of(module)
            if ours is not None:
                waiting.append(ours)
    return found


@pytest.mark.parametrize("file", SANS_IO)
def test_it_imports_nothing_that_does_io(file: str) -> None:
    found = reached(PACKAGE / file)
    assert {module: by for module, by in found.items() if module.split(".")[0] in IO} == {}


def test_the_protocol_of_yamux_is_among_them() -> None:
    assert {f"yamux/{name}.py" for name in ("frames", "flow", "outbox", "session")} <= set(SANS_IO)


@pytest.mark.parametrize("file", sorted(TRIO_SIDE | {"_net/link.py", "exchange/pump.py"}))
def test_where_trio_is_imported_it_is_found(file: str) -> None:
    """The test above can fail."""
    assert "trio" in reached(PACKAGE / file)
