"""What is wrong with `[relay.fleet]`, and with what it names. Each problem is a severity, a key path and a message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import trio

from ..._model.errors import StorageError, TunnelError
from ..._model.exception_groups import lone_error_bare
from ..._model.keys import PublicKey
from ..._storage import files
from ..fleet.config import FleetConfig
from ..fleet.keys import node_identity, node_public_key
from ..fleet.published import RedisUnreachable, connected

__all__ = ["FleetProblem", "problems_of_files", "problems_of_redis"]

FleetProblem: TypeAlias = tuple[Literal["error", "warning"], str, str]

_KEY = "relay.fleet"


def problems_of_files(fleet: FleetConfig) -> Iterator[FleetProblem]:
    """Read all files that the table names, but the state file. Blocks.

    Args:
        fleet: with complete paths.
    """
    own: PublicKey | None = None
    try:
        own = node_identity(fleet.key_file).public_key
    except TunnelError as error:
        yield "error", f"{_KEY}.key_file", str(error)
    names = {} if own is None else {own: fleet.node}
    for index, node in enumerate(fleet.nodes):
        place = f"{_KEY}.nodes[{index}].certificate"
        try:
            key = node_public_key(node.certificate)
        except TunnelError as error:
            yield "error", place, str(error)
            continue
        if names.setdefault(key, node.name) != node.name:
            yield "error", place, f"it is the certificate of {names[key]!r} too; each node has its own"
        elif node.name == fleet.node and own not in {None, key}:
            yield "error", place, "it is not the certificate in key_file, which this node shows"
    try:
        files.refuse_writable(fleet.state_file)
        if not files.exists(fleet.state_file.parent):
            raise StorageError(f"there is no folder {fleet.state_file.parent}")
    except StorageError as error:
        yield "error", f"{_KEY}.state_file", str(error)
    if fleet.redis.in_clear:
        message = "its password and all names pass the network in clear; use rediss:// or a tunnel of your own"
        yield "warning", f"{_KEY}.redis", message


async def problems_of_redis(fleet: FleetConfig) -> list[FleetProblem]:
    """Connect to Redis.

    Args:
        fleet: with complete paths.
    """
    try:
        with lone_error_bare():
            async with connected(fleet.redis_access):
                await trio.lowlevel.checkpoint()
    except RedisUnreachable as error:
        message = f"it cannot be used: {error}. A node starts without it, and serves the tunnels of its own file"
        return [("warning", f"{_KEY}.redis", message)]
    except TunnelError as error:
        return [("error", _KEY, str(error))]
    return []
