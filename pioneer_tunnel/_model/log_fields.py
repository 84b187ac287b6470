"""The structured fields of log records. A formatter for JSON finds them as attributes of the record.

    _log.info("tunnel %s is gone", tunnel_id, extra=about("tunnel_removed", tunnel=tunnel_id))

Their names and the events are listed in docs/operating.md; they do not change. The text of a record may.
"""

from __future__ import annotations

from typing import Any, Final, TypedDict, Unpack

from .text import clean_message

__all__ = ["LOG_FIELDS", "LogFields", "about"]


class LogFields(TypedDict, total=False):
    """What a record may say beside its event. None is left out."""

    tunnel: str | None
    session: str | None
    service: str | None
    peer: object
    reason: object
    file: object
    dropped: int
    worker: int


LOG_FIELDS: Final = ("event", *LogFields.__annotations__)
"""The names of all fields."""


def about(event: str, **fields: Unpack[LogFields]) -> dict[str, Any]:
    """The argument `extra` of a call of `logging`.

    Args:
        event: what has happened: a word that does not change.
        fields: `tunnel`, the id of the tunnel at a relay; `session`, the id of the session; `service`, its name;
            `peer`, the address of the other end; `reason`, why; `file`, which file; `dropped`, how many lines of the
            same kind were left out before this one; `worker`, which worker of the relay.
    """
    given = {name: value if isinstance(value, int) else clean_message(str(value)) for name, value in fields.items()
             if value is not None}  # fmt: skip
    return {"event": event} | given
