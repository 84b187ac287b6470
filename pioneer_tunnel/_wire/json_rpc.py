"""JSON-RPC 2.0, one message on each line, without I/O. Batches are not offered.

A request may hold a relay key. So nothing here raises while a request is in a local variable, and no error quotes one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeAlias, final

import attrs

from .._model.errors import RemoteProtocolError

__all__ = [
    "INTERNAL_ERROR",
    "INVALID_PARAMS",
    "INVALID_REQUEST",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "Id",
    "Request",
    "RpcError",
    "encode",
    "parse_message",
    "parse_request",
]

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603

Id: TypeAlias = str | int | None


@final
class RpcError(Exception):
    """The error of a JSON-RPC response.

    Attributes:
        code: the code of JSON-RPC 2.0.
        message: for a person; holds no secret.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code: Final = code
        self.message: Final = message

    def to_wire(self) -> dict[str, Any]:
        """The `error` object of a response."""
        return {"code": self.code, "message": self.message}


@final
@attrs.frozen(repr=False)
class Request:
    """A request. It has no repr, because its params may hold a key.

    Attributes:
        id: what the response repeats.
        method: the method.
        params: the params; None when there are none.
        wants_response: False for a notification.
    """

    id: Id
    method: str
    params: Any
    wants_response: bool


def parse_request(line: bytes | bytearray) -> Request | RpcError:
    """Read a request, or say why it is none. An id is a string, a whole number or null."""
    try:
        found = _loads(line)
    except (ValueError, RecursionError):
        return RpcError(PARSE_ERROR, "the line is not JSON")
    number = found.get("id") if isinstance(found, dict) else None
    if (
        not isinstance(found, dict)
        or found.get("jsonrpc") != "2.0"
        or not isinstance(found.get("method"), str)
        or not isinstance(number, str | int | None)
        or isinstance(number, bool)
    ):
        return RpcError(INVALID_REQUEST, "the line is no request of JSON-RPC 2.0")
    return Request(number, found["method"], found.get("params"), "id" in found)


def parse_message(line: bytes | bytearray) -> dict[str, Any]:
    """Read a response or a notification, as a client gets it.

    Raises:
        RemoteProtocolError: it is not a JSON object.
    """
    try:
        found = _loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RemoteProtocolError("a line that is not a JSON object")
    return found


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line; `jsonrpc` is added."""
    return json.dumps({"jsonrpc": "2.0", **message}, allow_nan=False).encode() + b"\n"


def _loads(line: bytes | bytearray) -> Any:
    return json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
