"""The server of a control socket."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, final

import trio

from .._model.errors import RemoteProtocolError, StorageError, TunnelError
from .._net.closing import close_after_answer
from .._net.log_limiter import LogLimiter
from .._wire.json_rpc import INTERNAL_ERROR, INVALID_REQUEST, Id, RpcError, encode, parse_request
from .credentials import require_unix_sockets, user_of_peer
from .folder import address_in
from .lines import Lines

__all__ = ["Handle", "serve_control"]

Handle: TypeAlias = Callable[[str, Any], Awaitable[dict[str, Any]]]
"""Answers a method with its params, or raises `RpcError` or a `TunnelError`."""

Notify: TypeAlias = Callable[[], AsyncIterator[dict[str, Any]]]
"""The notifications for one client, from now on."""

MOST_CLIENTS: Final = 16
SEND_TIMEOUT: Final = 10.0
"""Seconds that a client has to take a message."""

_BACKLOG: Final = 16

_log: Final = logging.getLogger("pioneer_tunnel.control")


async def serve_control(
    folder: Path,
    handle: Handle,
    *,
    notify: Notify | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve the socket in `folder` until cancelled. The caller holds the folder, see `hold`.

    Only processes of this user and of root are answered. A socket that a killed process left is replaced.

    Args:
        folder: the folder.
        handle: answers requests. The requests of one client are answered one after the other.
        notify: makes the notifications that a client gets without asking.
        task_status: started when the socket listens.

    Raises:
        StorageError: this system has no Unix sockets, others may enter the folder, or the socket cannot be made.
    """
    require_unix_sockets()
    server = _Server(handle, notify)
    with address_in(folder) as (address, _owner):
        # Quick: a socket is made in no time, and the lock is ours.
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(address, folder)))
        try:
            serve = functools.partial(trio.serve_listeners, server.serve, [listener])
            async with trio.open_nursery() as nursery:
                await nursery.start(serve)
                task_status.started()
        finally:
            with suppress(OSError):
                os.unlink(address)  # noqa: PTH108  # it goes by a descriptor
    raise AssertionError


def _listen(address: str, folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(address)  # noqa: PTH108  # as above
        listener.bind(address)
        os.chmod(address, 0o600)  # noqa: PTH101  # as above; until now the folder alone kept others out
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StorageError(f"the control socket in {folder} cannot be made: {error.strerror or error}") from error
    return listener


@final
class _Server:
    """The connections of one control socket."""

    def __init__(self, handle: Handle, notify: Notify | None) -> None:
        self._handle: Final = handle
        self._notify: Final = notify
        self._clients = 0
        self._log: Final = LogLimiter(_log)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one client. Never raises: one client must not end the others."""
        try:
            async with stream:
                refusal = self._why_refused(stream)
                client = _Client(stream)
                if refusal is not None:
                    self._log.log("refused", f"a client of the control socket is refused: {refusal}")
                    await client.dismiss(refusal)
                    return
                self._clients += 1
                try:
                    async with trio.open_nursery() as nursery:
                        if self._notify is not None:
                            nursery.start_soon(_send_all, client, self._notify())
                        await self._answer(client, Lines(stream))
                        nursery.cancel_scope.cancel()
                finally:
                    self._clients -= 1
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client is gone, or takes nothing
        except* Exception as failed:  # noqa: BLE001  # see above
            self._log.log("failed", "a client of the control socket failed", level=logging.ERROR, error=failed)

    def _why_refused(self, stream: trio.SocketStream) -> str | None:
        try:
            user = user_of_peer(stream.socket)
        except OSError as error:
            return f"it is not known who it is: {error.strerror or error}"
        if user not in {0, os.geteuid()}:
            return f"it is of user {user}, and this process is of user {os.geteuid()}"
        return f"there are {MOST_CLIENTS} already" if self._clients >= MOST_CLIENTS else None

    async def _answer(self, client: _Client, lines: Lines) -> None:
        while True:
            try:
                line = await lines.next()
            except RemoteProtocolError as error:
                await client.dismiss(str(error))
                return
            if line is None:
                return
            request = parse_request(line)
            del line  # it may hold a key, and a traceback may show local variables
            if isinstance(request, RpcError):
                await client.send_error(None, request)
                continue
            number, method, wanted = request.id, request.method, request.wants_response
            answer = self._handle(method, request.params)
            del request
            try:
                result = await self._guarded(method, answer)
            except RpcError as error:
                if wanted:
                    await client.send_error(number, error)
            else:
                if wanted:
                    await client.send({"id": number, "result": result})

    async def _guarded(self, method: str, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await answer
        except RpcError:
            raise
        except TunnelError as error:
            raise RpcError(INTERNAL_ERROR, str(error)) from error
        except Exception as error:
            line = f"an unforeseen failure in answering {method}"
            self._log.log("unforeseen", line, level=logging.ERROR, error=error)
            raise RpcError(INTERNAL_ERROR, f"an unforeseen failure, see the log: {type(error).__name__}") from error


async def _send_all(client: _Client, notifications: AsyncIterator[dict[str, Any]]) -> None:
    async for notification in notifications:
        await client.send(notification)


@final
class _Client:
    """Sends messages to one client, one at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream: Final = stream
        self._sending: Final = trio.Lock()

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            trio.TooSlowError: the client does not take it within 10 s.
            trio.BrokenResourceError: the client is gone.
        """
        with trio.fail_after(SEND_TIMEOUT):
            async with self._sending:
                await self._stream.send_all(encode(message))

    async def send_error(self, number: Id, error: RpcError) -> None:
        """Send the error of a response."""
        await self.send({"id": number, "error": error.to_wire()})

    async def dismiss(self, why: str) -> None:
        """Send a last error, and close."""
        await self.send_error(None, RpcError(INVALID_REQUEST, why))
        await close_after_answer(self._stream)
