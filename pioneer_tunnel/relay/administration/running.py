"""The control socket of a running relay: where it is, and what can be asked there.

The socket is in a folder of its own, below the first of these that there is: the folder that systemd has made for the
service (`RuntimeDirectory=`), the user's runtime folder (`XDG_RUNTIME_DIR`), `/run` for root; else it is beside the
relay's file. Its name follows from the path of that file. So a command that knows the file finds the socket.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, final

import attrs
import cattrs
import trio

from ..._control import AlreadyServedError, ControlClient, connect, hold, serve_control
from ..._model.errors import StorageError
from ..._storage import files
from ..._version import __version__
from ..._wire.json_rpc import INVALID_PARAMS, METHOD_NOT_FOUND, RpcError
from ...monitoring.site import Refresh
from ..sites import Told
from ..stats import RelayStats, RelayTunnelStats

__all__ = ["RunningRelay", "ask_running", "serve_control_socket"]

_NAME: Final = "pioneer-tunnel"
_SYSTEM: Final = Path("/run")
_PAGE_BYTES: Final = 64 * 1024
"""A page of tunnels ends with the one that exceeds this. A message of the socket may have four times as much."""

_RETRY_SECONDS: Final = 0.25
_STATS: Final = "relay/stats"
_TUNNELS: Final = "relay/tunnels"

_log: Final = logging.getLogger("pioneer_tunnel.relay.control")


# Where it is


def _places(config: Path) -> Iterator[Path]:
    """Where the socket of a relay with this file may be, the likeliest first."""
    path = config.parent.resolve() / config.name  # the file itself may be a link that is replaced
    name = f"relay-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    for base in (_of_systemd(), _of_user(), _SYSTEM / _NAME):
        if base is not None:
            yield base / name
    yield path.with_name(f"{path.name}.run")


def _of_systemd() -> Path | None:
    """The folder that systemd has made; see systemd.exec(5), RuntimeDirectory."""
    named = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(named) if named else None


def _of_user() -> Path | None:
    named = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return named / _NAME if named.is_absolute() else None  # a relative one counts for none


def _choose_place(config: Path) -> Path:
    """The first place that this process can use; the folder above it is made."""
    for place in _places(config):
        above = place.parent
        try:
            if above.name == _NAME:
                files.make_private_folder(above)
        except StorageError:
            continue
        if os.access(above, os.W_OK | os.X_OK):
            break
    return place  # the last one, if there is no other: what is wrong with it is an error


# The server


async def serve_control_socket(relay: Told, config: Path, *, refresh: Refresh | None = None) -> None:
    """Answer commands about a running relay, until cancelled. Returns, with a line in the log, if that cannot be.

    While another process of the same file serves, as during a handover, it waits for its end.

    Args:
        relay: the relay.
        config: its file.
        refresh: is awaited before its statistics are read, if that takes time; by default they are there.
    """
    try:
        place = await trio.to_thread.run_sync(_choose_place, config)
        with ExitStack() as held:
            while True:
                try:
                    await trio.to_thread.run_sync(held.enter_context, hold(place))
                except AlreadyServedError:
                    # No deadline: that process may drain for a long time.
                    await trio.sleep(_RETRY_SECONDS)
                else:
                    break
            await serve_control(place, _Answers(relay, refresh).handle)
    except StorageError as error:
        _log.warning("'relay status' cannot ask this relay: %s", error)


@final
class _Answers:
    def __init__(self, relay: Told, refresh: Refresh | None) -> None:
        self._relay: Final = relay
        self._refresh: Final = refresh

    async def handle(self, method: str, params: Any) -> dict[str, Any]:
        """Answer a request."""
        if self._refresh is not None:
            await self._refresh()
        stats = self._relay.stats()
        match method:
            case "relay/stats":
                rest: dict[str, Any] = cattrs.unstructure(attrs.evolve(stats, tunnels={}))
                return {"pid": os.getpid(), "version": __version__, "stats": rest}
            case "relay/tunnels":
                start = params.get("start", 0) if isinstance(params, dict) else 0
                if not isinstance(start, int) or start < 0:
                    raise RpcError(INVALID_PARAMS, "start: allowed is a whole number of at least 0")
                return _page([*stats.tunnels.items()], start)
            case _:
                raise RpcError(METHOD_NOT_FOUND, f"a relay does not know the method {method[:80]!r}")


def _page(tunnels: list[tuple[str, RelayTunnelStats]], start: int) -> dict[str, Any]:
    """Tunnels from the index `start` on, and the index of the next one, None at the end."""
    page: dict[str, Any] = {}
    size = 0
    for tunnel_id, stats in tunnels[start:]:
        page[tunnel_id] = cattrs.unstructure(stats)
        size += len(json.dumps(page[tunnel_id]))
        if size > _PAGE_BYTES:
            break
    following = start + len(page)
    return {"tunnels": page, "next": following if following < len(tunnels) else None}


# The client


@final
@attrs.frozen(kw_only=True)
class RunningRelay:
    """A relay that runs.

    Attributes:
        pid: its process.
        version: of its package.
        stats: what it has done and holds.
    """

    pid: int
    version: str
    stats: RelayStats


async def ask_running(config: Path) -> RunningRelay | None:
    """Ask the relay that runs with this file; None if there is none.

    Raises:
        StorageError: a relay cannot be asked: it is of another user, or does not answer.
    """
    async with _connected(config) as client:
        if client is None:
            return None
        try:
            found = await client.call(_STATS)
            tunnels: dict[str, RelayTunnelStats] = {}
            start: int | None = 0
            while start is not None:
                page = await client.call(_TUNNELS, {"start": start})
                tunnels |= cattrs.structure(page["tunnels"], dict[str, RelayTunnelStats])
                start = page["next"]
            running = cattrs.structure(found, RunningRelay)
        except RpcError as error:
            raise StorageError(f"the relay refuses to answer: {error}") from error
        except (cattrs.BaseValidationError, KeyError, TypeError, ValueError) as error:
            raise StorageError("the relay's answer is not understood; it may be of another version") from error
    return attrs.evolve(running, stats=attrs.evolve(running.stats, tunnels=tunnels))


@asynccontextmanager
async def _connected(config: Path) -> AsyncIterator[ControlClient | None]:
    """The first place where a relay serves. A place that cannot be entered counts if there is no other one."""
    failure: StorageError | None = None
    async with AsyncExitStack() as stack:
        for place in _places(config):
            try:
                client = await stack.enter_async_context(connect(place))
            except StorageError as error:
                failure = failure or error
            else:
                if client is not None:
                    yield client
                    return
        if failure is not None:
            raise failure
        yield None
