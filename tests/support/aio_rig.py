"""What the tests of `pioneer_tunnel.aio` share: an event loop of each kind, visitors, and remote access."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from gateway import Gateway
from rig import AT_ONCE, KEY, RELAY_NAME, RelayRig, open_sockets, wait_until

from pioneer_tunnel import MemoryKeystore, SettingsFile
from pioneer_tunnel.aio import RemoteAccess

URL: Final = f"ws://{RELAY_NAME}"


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs a coroutine as a host does, on each kind of loop, in debug mode; nothing may be left behind."""
    loops = importlib.import_module(request.param)
    sockets = open_sockets()

    def run(main: Any) -> Any:
        with asyncio.Runner(debug=True, loop_factory=loops.new_event_loop) as runner:
            return runner.run(_bounded(main))

    yield run
    assert not [thread for thread in threading.enumerate() if thread.name == "pioneer-tunnel"]
    wait_until(lambda: open_sockets() <= sockets)  # the relay is a thread of this process, and has its ends of them


async def _bounded(main: Awaitable[Any]) -> Any:
    async with asyncio.timeout(60):
        return await main


def options(relay: RelayRig, **changes: Any) -> dict[str, Any]:
    return {"key": KEY, "dial": relay.dial, "restart": AT_ONCE, **changes}


async def ask(relay: RelayRig, text: bytes = b"hello") -> bytes:
    """Visit, and read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.addresses.tunnels["office"].port)
    try:
        writer.write(text)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def hello(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def remote_access(relay: RelayRig, folder: Path, **changes: Any) -> RemoteAccess:
    """With its files in `folder`; `changes` are of its configuration, but for `app`."""
    app = changes.pop("app", None)
    return RemoteAccess(
        Gateway(folder).config(relay_addr=URL, restart_initial_ms=10, **changes),
        settings=SettingsFile(folder / "settings.toml"),
        keystore=MemoryKeystore(),
        dial=relay.dial,
        app=app,
    )
