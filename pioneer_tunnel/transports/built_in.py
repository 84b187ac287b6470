"""The transports of this library, by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from .._model.keys import PublicKey
from ..websocket import EngineName
from ..yamux import Limits
from .interface import BuiltInTransport
from .native import NativeTransport
from .process.config import TunnelProgram
from .process.program import ProcessTransport
from .rathole.control_channel import RatholeTransport
from .rathole.key_mode import KeyMode

__all__ = ["TRANSPORTS", "configured_transport"]

TRANSPORTS: Final[Mapping[str, BuiltInTransport]] = {
    "websocket": NativeTransport(),
    "tcp": RatholeTransport(),
    "tls": RatholeTransport(tls=True),
    "process": ProcessTransport(),
}
"""The transports that this installation has, with the default options."""


def configured_transport(
    name: str,
    *,
    relay_identity: PublicKey | None,
    key_mode: KeyMode,
    limits: Limits,
    resume_timeout: float,
    websocket_engine: EngineName | None = None,
    heartbeat: float | None = None,
    program: TunnelProgram | None = None,
) -> BuiltInTransport | None:
    """The transport called `name`, with those of the options that it has; None when there is none of that name."""
    match TRANSPORTS.get(name):
        case NativeTransport() as native:
            return attrs.evolve(
                native,
                relay_identity=relay_identity,
                limits=limits,
                engine=websocket_engine,
                heartbeat=heartbeat,
                resume_timeout=resume_timeout,
            )
        case RatholeTransport() as rathole:
            return attrs.evolve(rathole, key_mode=key_mode, max_streams=limits.streams)
        case ProcessTransport() as process:
            return attrs.evolve(process, program=program)
        case _:
            return None
