"""The transports of this library, by the names that a configuration uses.

A transport is imported when it is first asked for: a process uses one or none, and each takes time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final, final

from .._model.engine_names import EngineName
from .._model.keys import PublicKey
from .._model.session_limits import Limits
from .interface import BuiltInTransport
from .rathole.key_mode import KeyMode

if TYPE_CHECKING:
    from .process.config import TunnelProgram

__all__ = ["TRANSPORTS", "configured_transport"]

_NAMES: Final = ("websocket", "tcp", "tls", "process")


@final
class _Transports(Mapping[str, BuiltInTransport]):
    def __getitem__(self, name: str) -> BuiltInTransport:
        transport = _default(str(name))  # one for a name, also if that is of an enum
        if transport is None:
            raise KeyError(name)
        return transport

    def __contains__(self, name: object) -> bool:
        return name in _NAMES

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


TRANSPORTS: Final[Mapping[str, BuiltInTransport]] = _Transports()
"""The transports that this installation has, with the default options."""


@cache
def _default(name: str) -> BuiltInTransport | None:
    return _make(name, {}, {}, {})


def _make(
    name: str, websocket: Mapping[str, Any], rathole: Mapping[str, Any], process: Mapping[str, Any]
) -> BuiltInTransport | None:
    """The transport called `name`, with those of the options that are its own."""
    match name:
        case "websocket":
            from .native import NativeTransport  # noqa: PLC0415  # see the module

            return NativeTransport(**websocket)
        case "tcp" | "tls":
            from .rathole.control_channel import RatholeTransport  # noqa: PLC0415  # see the module

            return RatholeTransport(tls=name == "tls", **rathole)
        case "process":
            from .process.program import ProcessTransport  # noqa: PLC0415  # see the module

            return ProcessTransport(**process)
        case _:
            return None


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
    websocket = {
        "relay_identity": relay_identity,
        "limits": limits,
        "engine": websocket_engine,
        "heartbeat": heartbeat,
        "resume_timeout": resume_timeout,
    }
    rathole = {"key_mode": key_mode, "max_streams": limits.streams}
    return _make(name, websocket, rathole, {"program": program})
