"""A program: what works where the modules of POSIX cannot be imported. tests/test_portability.py runs it.

python tests/support/without_posix.py modules           no fcntl, termios, resource and so on
python tests/support/without_posix.py windows           nor what Windows lacks in os, select, signal and socket
python tests/support/without_posix.py windows TESTS     runs these tests in that state

Everything of ours is imported while these are gone. Then this system gets them back, because its Trio and its pytest
need them, and our modules alone go on without: each sees a copy of `os`, `select`, `signal`, `socket` and `sys` that
lacks them.
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
import types
from pathlib import Path

import click
import click.testing
import hypothesis
import pytest
import trio
import trio.testing
import trio_websocket
import trustme

BLOCKED = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
LACKING = {
    os: ("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "WNOHANG", "fchmod", "fchown",
         "fork", "geteuid", "getpgid", "getuid", "killpg", "pidfd_open", "pipe2", "posix_spawn", "readv",
         "set_blocking", "setsid", "splice", "waitid", "writev",
         *(name for name in dir(os) if name.startswith("SPLICE_"))),
    select: ("epoll", "poll", *(name for name in dir(select) if name.startswith("EPOLL"))),
    signal: ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2"),
    socket: ("AF_NETLINK", "AF_UNIX", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "SO_PEERCRED", "TCP_CONGESTION", "TCP_INFO",
             "TCP_NOTSENT_LOWAT", "TCP_USER_TIMEOUT", "recv_fds", "send_fds"),
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


def files_are_read_and_not_written() -> None:
    from pioneer_tunnel import Certificate, StorageError
    from pioneer_tunnel._net.tls.client import client_tls
    from pioneer_tunnel._storage import files
    from pioneer_tunnel.cli.commands import pioneer_tunnel
    from pioneer_tunnel.cli.keys import read_key
    from pioneer_tunnel.relay import RelayConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = trustme.CA()
        issued = authority.issue_cert("relay.test")
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        issued.private_key_pem.write_to_path(str(folder / "key.pem"))
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
        client_tls(folder / "ca.pem")
        Certificate(folder / "cert.pem", folder / "key.pem")
        secret = folder / "secret.txt"
        secret.write_text("ptk1_0123456789abcdef0123456789abcdef")
        assert not read_key(secret, native=True).is_weak
        config = folder / "relay.toml"
        config.write_text(
            '[relay]\nid = "r"\npublic_names = ["relay.test"]\n'
            'control_addr = "127.0.0.1:0"\ningress_addr = "127.0.0.1:0"\n'
        )
        assert RelayConfig.load(config).id == "r"
        for command, said in {
            "list": "has no tunnels",
            "check": "nothing is wrong",
            "add": "and this system has no fcntl",
            "status": "this system",
        }.items():
            words = ["relay", command, *(["home"] if command == "add" else []), "--config", str(config)]
            output = click.testing.CliRunner().invoke(pioneer_tunnel, words).output
            if said not in " ".join(output.split()):
                raise AssertionError(output)
        for write in (lambda: files.replace(config, b""), lambda: files.remove(config)):
            with pytest.raises(StorageError, match="fcntl"):
                write()


async def everything() -> None:
    with trio.fail_after(30):
        await through_memory()
        await through_sockets()
        await remote_access_says_why_not()


def without(real: types.ModuleType, names: tuple[str, ...], **others: object) -> types.ModuleType:
    """A copy of a module without some names."""
    copy = types.ModuleType(real.__name__)
    vars(copy).update({name: value for name, value in vars(real).items() if name not in names} | others)
    return copy


def take_away(*, as_on_windows: bool) -> None:
    """Import everything of ours without what POSIX alone has, and leave it without."""
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    if not as_on_windows:
        import_everything()
        return
    taken = {(module, name): getattr(module, name) for module, names in LACKING.items() for name in names}
    platform, sys.platform = sys.platform, "win32"
    for module, name in taken:
        delattr(module, name)
    import_everything()
    sys.platform = platform
    for (module, name), value in taken.items():
        setattr(module, name, value)
    for name in BLOCKED:
        del sys.modules[name]
    copies = {module: without(module, names) for module, names in LACKING.items()}
    copies[sys] = without(sys, (), platform="win32")
    for ours in [module for name, module in sys.modules.items() if name.partition(".")[0] == "pioneer_tunnel"]:
        for name, value in [*vars(ours).items()]:
            if isinstance(value, types.ModuleType) and value in copies:
                setattr(ours, name, copies[value])


def main(kind: str, *tests: str) -> None:
    assert all((asyncio, click, hypothesis, pytest, trio.testing, trio_websocket))
    take_away(as_on_windows=kind == "windows")
    if tests:
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        sys.exit(pytest.main([*options, *tests]))
    trio.run(everything)
    files_are_read_and_not_written()
    print("all of it works")


if __name__ == "__main__":
    main(*sys.argv[1:])
