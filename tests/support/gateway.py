"""A gateway that embeds remote access, in virtual time: stores on the disk, and a transport that follows a script."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, final

import attrs
import pytest
import trio
from rig import only_looks

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore, MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import Settings, SettingsFile, SettingsUpdate
from pioneer_tunnel.testing import ScriptedTransport, virtual_time
from pioneer_tunnel.testing.virtual_time import without_threads
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

KEY: Final = RelayKey("ptk1_the-first-key-0123456789abcdef")
OTHER_KEY: Final = RelayKey("ptk1_the-second-key-0123456789abcdef")
EPOCH: Final = 1_700_000_000
ON: Final = SettingsUpdate(enabled=True)
OFF: Final = SettingsUpdate(enabled=False)
NEW_KEY: Final = SettingsUpdate(key=OTHER_KEY)
CLEAR_KEY: Final = SettingsUpdate(clear_key=True)

_T = TypeVar("_T")


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in virtual time, and without threads."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        with without_threads():
            virtual_time(test)(**arguments)

    return run


def wall_clock() -> float:
    return EPOCH + trio.current_time()


@final
class FaultyKeystore:
    """A keystore in memory that fails when it is told to.

    Attributes:
        failing: methods that raise.
        failing_late: methods that raise when they have done their work.
        hold_get: what the next `get` waits for before it looks.
    """

    def __init__(self) -> None:
        self._keys = MemoryKeystore()
        self.failing: set[str] = set()
        self.failing_late: set[str] = set()
        self.hold_get: trio.Event | None = None

    async def get(self, reference: str) -> RelayKey | None:
        held, self.hold_get = self.hold_get, None
        if held is not None:
            await held.wait()
        return await self._faulty("get", self._keys.get(reference))

    async def put(self, reference: str, key: RelayKey) -> None:
        await self._faulty("put", self._keys.put(reference, key))

    async def delete(self, reference: str) -> None:
        await self._faulty("delete", self._keys.delete(reference))

    async def exists(self, reference: str) -> bool:
        return await self._keys.exists(reference)

    async def _faulty(self, name: str, work: Awaitable[_T]) -> _T:
        fails = name in self.failing
        self.failing.discard(name)
        if fails:
            work.close()  # type: ignore[attr-defined]
            raise StorageError(f"the keystore cannot {name}, as the test has it")
        result = await work
        if name in self.failing_late:
            self.failing_late.discard(name)
            raise StorageError(f"the keystore cannot {name} durably, as the test has it")
        return result


@contextmanager
def failing_once(name: str, *, after: int = 0) -> Iterator[list[int]]:
    """Let one call of the operating system fail, once `after` of its kind went well; gives the calls that failed."""
    real = getattr(os, name)
    calls = 0
    failed: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if only_looks(name, args):
            return real(*args, **kwargs)
        calls += 1
        if calls == after + 1:
            failed.append(calls)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield failed


@final
class Carried:
    """A visitor who says nothing and waits, until the stream is reset or closed."""

    def __init__(self) -> None:
        self.usable = True
        self.acknowledged = False
        self.was_reset = False
        self._over = trio.Event()

    def acknowledge(self) -> None:
        self.acknowledged = True

    def reset(self) -> None:
        self.was_reset = self.was_reset or self.usable
        self.usable = False
        self._over.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await self._over.wait()
        raise trio.BrokenResourceError("the stream was reset")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if not self.usable:
            raise trio.BrokenResourceError("the stream was reset")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.usable = False
        self._over.set()
        await trio.lowlevel.checkpoint()


async def wait_for_the_end(stream: TunnelStream) -> None:
    """A handler that holds its stream for as long as it works."""
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()


@final
@attrs.define
class Gateway:
    """What stays when a gateway's process is started again: its folder and its keystore."""

    folder: Path
    transport: ScriptedTransport = attrs.field(factory=ScriptedTransport)
    keystore: Any = attrs.field(factory=FaultyKeystore)

    @property
    def settings_path(self) -> Path:
        return self.folder / "gateway-settings.toml"

    def config(self, **changes: Any) -> RemoteAccessConfig:
        fields: dict[str, Any] = {
            "relay_addr": "wss://relay.test",
            "base_dir": self.folder,
            "restart_jitter_percent": 0,
        }
        return RemoteAccessConfig(**(fields | changes))

    def remote_access(self, config: dict[str, Any] | None = None, **changes: Any) -> RemoteAccess:
        """The gateway's remote access, as at the start of a process."""
        arguments: dict[str, Any] = {
            "settings": SettingsFile(self.settings_path),
            "keystore": None if "key_provider" in changes else self.keystore,
            "handler": wait_for_the_end,
            "transports": {"websocket": self.transport},
            "wall_clock": wall_clock,
        }
        return RemoteAccess(self.config(**(config or {})), **(arguments | changes))

    def store(self, text: str = "enabled = true") -> None:
        """Write the settings as another program would."""
        self.settings_path.write_text(f"[remote_access]\n{text}\n")

    def stored(self) -> Settings:
        return SettingsFile(self.settings_path).read()

    async def stored_key(self) -> RelayKey | None:
        key: RelayKey | None = await self.keystore.get(DEFAULT_SECRET_REF)
        return key


@asynccontextmanager
async def running(remote_access: RemoteAccess) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        yield nursery
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(remote_access: RemoteAccess) -> AsyncIterator[trio.Nursery]:
    """Run it, with remote access switched on and a key saved, until it is up."""
    async with running(remote_access) as nursery:
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        yield nursery


def shown(remote_access: RemoteAccess) -> tuple[State, ErrorKind | None]:
    return remote_access.status.state, remote_access.status.error_kind


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    """A gateway for tests in virtual time."""
    return Gateway(tmp_path)


@pytest.fixture
def real_gateway(tmp_path: Path) -> Gateway:
    """A gateway with a clock, threads and a relay on loopback."""
    return Gateway(tmp_path, keystore=FileKeystore(tmp_path / "keystore"))
