"""The client of a control socket."""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, final

import trio

from .._model.errors import RemoteProtocolError, StorageError
from .._model.text import clean_message
from .._wire.json_rpc import INTERNAL_ERROR, RpcError, encode, parse_message
from .credentials import require_unix_sockets, user_of_peer
from .folder import address_in
from .lines import Lines

__all__ = ["ControlClient", "connect"]

CONNECT_TIMEOUT: Final = 5.0
CALL_TIMEOUT: Final = 30.0
"""Seconds for an answer. A gateway's stores may take 20."""

_BACKLOG_PAUSE: Final = 0.02


@asynccontextmanager
async def connect(folder: Path) -> AsyncIterator[ControlClient | None]:
    """Connect to the process that serves `folder`; None when there is none.

    Raises:
        StorageError: this system has no Unix sockets, the folder cannot be entered, the process is of another user,
            or it does not answer.
    """
    require_unix_sockets()
    try:
        with address_in(folder) as (address, owner):
            stream = await _connected(address, folder)
    except FileNotFoundError:
        yield None
        return
    if stream is None:
        yield None
        return
    async with stream:
        _refuse_stranger(stream, folder, owner)
        yield ControlClient(stream, folder)


async def _connected(address: str, folder: Path) -> trio.SocketStream | None:
    """The connection; None when no process listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with trio.fail_after(CONNECT_TIMEOUT):
            while True:
                try:
                    connection.connect(address)
                except BlockingIOError:  # its backlog is full
                    await trio.sleep(_BACKLOG_PAUSE)
                else:
                    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise StorageError(f"the control socket in {folder} cannot be used: {error.strerror or error}") from error
    except BaseException as error:
        connection.close()
        if isinstance(error, trio.TooSlowError):
            raise _no_answer(folder) from None
        raise


def _refuse_stranger(stream: trio.SocketStream, folder: Path, owner: int) -> None:
    """Check that the process is of the owner of the folder or of root, so that no key goes to anybody else."""
    try:
        user = user_of_peer(stream.socket)
    except OSError as error:
        raise StorageError(f"who serves {folder} is not known: {error.strerror or error}") from error
    if user not in {0, owner}:
        raise StorageError(f"{folder} is of user {owner}, and user {user} serves it; nothing was sent")


def _no_answer(folder: Path) -> StorageError:
    return StorageError(f"the process that serves {folder} does not answer")


@final
class ControlClient:
    """A connection to a running process. One task at a time may use it. Made by `connect`."""

    def __init__(self, stream: trio.SocketStream, folder: Path) -> None:
        self._stream: Final = stream
        self._folder: Final = folder
        self._lines: Final = Lines(stream)
        self._numbers: Final = itertools.count(1)
        self._notifications: Final[deque[dict[str, Any]]] = deque()

    async def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call a method; returns its result.

        Raises:
            RpcError: the process refuses; the message is for a person.
            StorageError: it does not answer within 30 s, has ended, or its answer is not understood.
        """
        number = next(self._numbers)
        try:
            with trio.fail_after(CALL_TIMEOUT):
                await self._stream.send_all(encode({"id": number, "method": method, "params": params or {}}))
                del params  # it may hold a key
                while "method" in (message := await self._next()):
                    self._notifications.append(message)
        except trio.TooSlowError:
            raise _no_answer(self._folder) from None
        except trio.BrokenResourceError:
            raise self._has_ended() from None
        if isinstance(refusal := message.get("error"), dict):
            code, text = refusal.get("code"), refusal.get("message")
            raise RpcError(code if isinstance(code, int) else INTERNAL_ERROR, clean_message(str(text)))
        result = message.get("result")
        if message.get("id") != number or not isinstance(result, dict):
            raise StorageError(f"the answer of the process that serves {self._folder} is not understood")
        return result

    async def notification(self) -> dict[str, Any]:
        """The next notification; waits for it, without a deadline.

        Raises:
            StorageError: the process has ended.
        """
        if self._notifications:
            return self._notifications.popleft()
        try:
            return await self._next()
        except trio.BrokenResourceError:
            raise self._has_ended() from None

    async def _next(self) -> dict[str, Any]:
        try:
            line = await self._lines.next()
            if line is None:
                raise self._has_ended()
            return parse_message(line)
        except RemoteProtocolError as error:
            raise StorageError(f"the process that serves {self._folder} sends {error}") from error

    def _has_ended(self) -> StorageError:
        return StorageError(f"the process that serves {self._folder} has ended")
