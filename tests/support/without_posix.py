"""A program: what works where the modules of POSIX cannot be imported. tests/test_portability.py runs it.

python tests/support/without_posix.py modules     no fcntl, termios, resource and so on
python tests/support/without_posix.py windows     nor what Windows lacks in os, select, signal and socket
"""

from __future__ import annotations

# What is not ours is imported first: it has its own ways to do without.
import asyncio
import functools
import importlib
import os
import pkgutil
import select
import signal
import socket
import sys
import tempfile
from pathlib import Path

import click
import hypothesis
import pytest
import trio
import trio.testing
import trio_websocket

BLOCKED = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
LACKING = {
    os: ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fchown", "fork", "geteuid", "getuid",
         "killpg", "pipe2", "readv", "splice", *(name for name in dir(os) if name.startswith("SPLICE_"))),
    select: ("epoll", "poll", *(name for name in dir(select) if name.startswith("EPOLL"))),
    signal: ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGPIPE", "SIGCHLD"),
    socket: ("AF_UNIX",),
}  # fmt: skip


def import_everything() -> None:
    import pioneer_tunnel

    names = [module.name for module in pkgutil.walk_packages(pioneer_tunnel.__path__, "pioneer_tunnel.")]
    for name in [*names, "pytest_pioneer_tunnel"]:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    print(f"imported {len(names)} modules")


async def through_memory() -> None:
    from pioneer_tunnel import open_tunnel
    from pioneer_tunnel.testing import open_memory_relay

    async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
        await tunnel.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        async with await tunnel.accept() as stream:
            assert await stream.receive_some() == b"hello"
            await stream.send_all(b"welcome")
        assert await visitor.receive_some() == b"welcome"


async def through_sockets() -> None:
    """A relay, a tunnel that forwards to a local server, and a visitor; enough bytes for every way to carry them."""
    from pioneer_tunnel import Address, forward, new_relay_key, open_tunnel
    from pioneer_tunnel.relay import Relay, RelayConfig

    said = bytes(range(256)) * 4096
    key = new_relay_key()
    entry = {"id": "t", "url": "http://t.test", "key": key.identity().public_key, "bind_addr": "127.0.0.1:0"}
    config = RelayConfig(
        control_addr="127.0.0.1:0", ingress_addr="127.0.0.1:0", id="r", public_names=["127.0.0.1"], tunnels=[entry]
    )

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(Relay(config).serve)
        (local,) = await nursery.start(functools.partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        handler = functools.partial(forward, local=Address(*local.socket.getsockname()))

        async def dial(host: str, port: int) -> trio.SocketStream:
            return await trio.open_tcp_stream(host, addresses.control.port)

        async with open_tunnel("ws://127.0.0.1", key=key, dial=dial) as tunnel:
            nursery.start_soon(trio.serve_listeners, handler, [tunnel])
            await tunnel.wait_connected()
            async with await trio.open_tcp_stream("127.0.0.1", addresses.tunnels["t"].port) as visitor:
                nursery.start_soon(visitor.send_all, said)
                heard = b""
                while len(heard) < len(said):
                    data = await visitor.receive_some()
                    assert data
                    heard += data
                assert heard == said
            nursery.cancel_scope.cancel()


async def remote_access_says_why_not() -> None:
    from pioneer_tunnel import (
        MemoryKeystore,
        RelayKey,
        RemoteAccess,
        RemoteAccessConfig,
        SettingsFile,
        SettingsUpdate,
        StorageError,
    )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        config = RemoteAccessConfig(relay_addr="ws://relay.test", base_dir=folder)
        settings = SettingsFile(Path(folder) / "settings.toml")
        remote_access = RemoteAccess(config, settings=settings, keystore=MemoryKeystore())
        try:
            await remote_access.apply(
                SettingsUpdate(enabled=True, key=RelayKey("ptk1_0123456789abcdef0123456789abcdef"))
            )
        except StorageError as error:
            told = str(error)
        else:
            told = "it was stored without a lock"
        if "fcntl" not in told:
            raise AssertionError(told)


async def everything(kind: str) -> None:
    with trio.fail_after(30):
        await through_memory()
        await through_sockets()
        if kind == "modules":
            await remote_access_says_why_not()
    print("all of it works")


def main(kind: str) -> None:
    assert all((asyncio, click, hypothesis, pytest, trio.testing, trio_websocket))
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    taken = {(module, name): getattr(module, name) for module, names in LACKING.items() for name in names}
    if kind == "windows":
        sys.platform = "win32"
        for module, name in taken:
            delattr(module, name)
    import_everything()
    for (module, name), value in taken.items():
        if module in {select, socket}:
            setattr(module, name, value)  # this system's Trio needs it
    trio.run(everything, kind)


if __name__ == "__main__":
    main(sys.argv[1])
