"""How a command reaches a gateway: over the control socket of one that runs, else by its settings and its keystore.

Both ways take the same JSON-RPC methods. While the stores of a gateway that does not run are changed, none can start:
it would not notice the change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Final, Protocol

import trio

from .._control import AlreadyServedError, connect, hold
from .remote_access import RemoteAccess
from .rpc import RemoteAccessRpc

__all__ = ["ReachedGateway", "reach_gateway"]

PATIENCE: Final = 5.0
"""Seconds for a process that starts or ends. It holds the folder, and does not answer."""

_PAUSE: Final = 0.05


class ReachedGateway(Protocol):
    """A gateway that was reached."""

    async def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call a method of `RemoteAccessRpc`; returns its result.

        Raises:
            RpcError: the gateway refuses.
            StorageError: it does not answer.
        """

    async def notification(self) -> dict[str, Any]:
        """The next notification.

        Raises:
            StorageError: the gateway has ended.
        """


class _Stores:
    """A gateway that does not run."""

    def __init__(self, remote_access: RemoteAccess) -> None:
        self._rpc: Final = RemoteAccessRpc(remote_access)

    async def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._rpc.handle(method, params)

    async def notification(self) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError


@asynccontextmanager
async def reach_gateway(
    remote_access: RemoteAccess, *, change: bool = False
) -> AsyncIterator[tuple[ReachedGateway, bool]]:
    """Reach a gateway; yields it, and whether it runs.

    Args:
        remote_access: the gateway's configuration, settings and keystore. Its `run` is not called.
        change: whether something will be changed.

    Raises:
        StorageError: the runtime folder cannot be used, or the process that holds it does not answer within 5 s.
    """
    folder = remote_access.config.runtime_path
    deadline = trio.current_time() + PATIENCE
    while True:
        async with connect(folder) as client:
            if client is not None:
                yield client, True
                return
        with ExitStack() as held:
            try:
                if change:
                    held.enter_context(hold(folder))
            except AlreadyServedError:
                if trio.current_time() > deadline:
                    raise
            else:
                yield _Stores(remote_access), False
                return
        await trio.sleep(_PAUSE)
