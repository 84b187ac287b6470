"""Remote access over JSON-RPC 2.0, for a gateway to mount: two methods and a notification.

    settings/get      {}                                    → {"settings": {"remote_access": SNAPSHOT, …}}
    settings/update   {"update": {"remote_access": UPDATE}} → the same
    gateway/remote_access/status_changed {"status": STATUS}   to every client, for each change that is news

`RemoteAccessRpc.handle` takes a method and its params and returns the result. Framing, ids and connections are up to
the gateway. docs/remote-access.schema.json has the JSON Schema. The gateway contract fixes the names and shapes.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, final

from .._model.errors import TunnelError
from .._model.log_fields import about
from .._model.status import Status
from .._model.text import clean_message
from .._net.log_limiter import LogLimiter
from .._wire.json_rpc import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, RpcError
from .remote_access import RemoteAccess
from .settings import SettingsUpdate
from .snapshot import Snapshot

__all__ = [
    "STATUS_CHANGED",
    "Notifications",
    "RemoteAccessRpc",
]

STATUS_CHANGED: Final = "gateway/remote_access/status_changed"
_SECTION: Final = "remote_access"

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.jsonrpc"))


@final
class RemoteAccessRpc:
    """The contract's methods on a `RemoteAccess`.

    Args:
        remote_access: the remote access to show and change.
        other_sections: returns the sections that the host adds to `settings`; called for each response.
    """

    def __init__(self, remote_access: RemoteAccess, *, other_sections: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._remote_access: Final = remote_access
        self._other_sections: Final = other_sections

    async def handle(self, method: str, params: Any = None) -> dict[str, Any]:
        """Answer a request; returns the `result` of the response.

        Raises:
            RpcError: with the code of the response: -32601 for an unknown method, -32602 for params that are malformed
                or cannot work, -32603 when a file or the keystore cannot be read or written.
        """
        update, refusal = _read_request(method, params)
        del params  # it may hold the key: a traceback that shows local variables must not show it
        if refusal is not None:
            raise refusal
        try:
            if update is None:
                return self._answer(await self._remote_access.snapshot())
            result = await self._remote_access.apply_and_show(update)
            if isinstance(result, Snapshot):
                return self._answer(result)
        except TunnelError as error:
            raise RpcError(INTERNAL_ERROR, str(error)) from error
        except Exception as error:
            line = f"an unforeseen failure in answering {method}"
            fields = about("unforeseen", reason=type(error).__name__)
            _log_limiter.log(method, line, level=logging.ERROR, error=error, about=fields)
            raise RpcError(INTERNAL_ERROR, f"an unforeseen failure, see the log: {type(error).__name__}") from error
        del update  # it may hold the key, also in a wrong field
        raise RpcError(INVALID_PARAMS, f"{_SECTION}: {result}")

    def _answer(self, snapshot: Snapshot) -> dict[str, Any]:
        return {"settings": {**self._other_sections(), _SECTION: snapshot.to_wire()}}

    def notifications(self) -> AsyncIterator[dict[str, Any]]:
        """The notifications for one client, from now on: one for each status that is news.

        A plain iterator; it ends after `stopped`. A slow client skips statuses, but never the newest.
        """
        return Notifications(self._remote_access.status, self._remote_access.watch())


@final
class Notifications(AsyncIterator[dict[str, Any]]):
    """A notification for each status that is news to a client that knows the status `sent`."""

    def __init__(self, sent: Status, statuses: AsyncIterator[Status]) -> None:
        self._sent = sent
        self._statuses: Final = statuses

    def __aiter__(self) -> Notifications:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while True:
            status = await anext(self._statuses)
            if status.is_news_after(self._sent):
                self._sent = status
                return {"jsonrpc": "2.0", "method": STATUS_CHANGED, "params": {"status": status.to_wire()}}


def _read_request(method: str, params: Any) -> tuple[SettingsUpdate | None, RpcError | None]:
    """The update in the request, and why the request is refused. Never raises, so no traceback holds the key."""
    if method not in ("settings/get", "settings/update"):  # a tuple: a host may pass what is not hashable
        return None, RpcError(METHOD_NOT_FOUND, f"there is no method {clean_message(str(method))!r} here")
    if params is not None and not isinstance(params, Mapping):
        return None, RpcError(INVALID_PARAMS, "params is not an object")
    if method == "settings/get":
        return None, None
    update = None if params is None else params.get("update")
    if not isinstance(update, Mapping):
        return None, RpcError(INVALID_PARAMS, "params.update is not an object")
    section = update.get(_SECTION)
    if section is None:
        return SettingsUpdate(), None
    try:
        return SettingsUpdate.from_wire(section), None
    except ValueError as error:
        return None, RpcError(INVALID_PARAMS, str(error))
