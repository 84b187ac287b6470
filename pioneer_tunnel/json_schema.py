"""JSON Schema of what remote access says on the wire, made from the types that say it.

    python -m pioneer_tunnel.json_schema > docs/remote-access.schema.json

Neighbours: `jsonrpc` has the shapes; a test holds the copy in docs/ against this.
"""

from __future__ import annotations

import enum
import json
import sys
import types
import typing
from typing import Any, Final, Literal

import attrs

from .identity import MAX_KEY_LENGTH, RelayKey
from .jsonrpc import STATUS_CHANGED
from .settings import MAX_SERVER_LENGTH, SettingsUpdate
from .snapshot import Snapshot
from .status import MESSAGE_LIMIT, Status

__all__ = ["json_schema"]

_LIMITS: Final[dict[tuple[type, str], dict[str, Any]]] = {
    (Status, "message"): {"maxLength": MESSAGE_LIMIT},
    # White space around these is trimmed before it is counted, which a schema cannot say.
    (SettingsUpdate, "server"): {"maxLength": MAX_SERVER_LENGTH},
    (SettingsUpdate, "key"): {"minLength": 1, "maxLength": MAX_KEY_LENGTH, "writeOnly": True},
}
_PRIMITIVES: Final[dict[Any, dict[str, Any]]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    RelayKey: {"type": "string"},
    Status: {"$ref": "#/$defs/STATUS"},
}


def json_schema() -> dict[str, Any]:
    """The schema document (draft 2020-12). Objects are open: who reads ignores what it does not know."""
    result = _object({"settings": _object({"remote_access": {"$ref": "#/$defs/SNAPSHOT"}})})
    update = _object({"update": _object({"remote_access": {"$ref": "#/$defs/UPDATE"}}, required=[])})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Remote access of a Pioneer gateway over JSON-RPC 2.0",
        "$defs": {
            "STATUS": _class(Status),
            "SNAPSHOT": _class(Snapshot),
            "UPDATE": _class(SettingsUpdate, nullable=True),
            "settings/get": _object({"params": {"type": "object"}, "result": result}),
            "settings/update": _object({"params": update, "result": result}),
            STATUS_CHANGED: _object({"params": _object({"status": {"$ref": "#/$defs/STATUS"}})}),
        },
    }


def _class(cls: type[attrs.AttrsInstance], *, nullable: bool = False) -> dict[str, Any]:
    """An attrs class as an object; what has a default may be absent, and with `nullable` null as well."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in attrs.fields(cls):
        schema = {**_type(hints[field.name]), **_LIMITS.get((cls, field.name), {})}
        if nullable:
            schema["type"] = [schema["type"], "null"]
        properties[field.name] = schema
    return _object(properties, required=[field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING])


def _type(hint: Any) -> dict[str, Any]:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        # None is never on the wire: an optional field is absent.
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _type(hint)
    if typing.get_origin(hint) is Literal:
        return {"type": "string", "enum": [*arguments]}
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return {"type": "string", "enum": [str(member) for member in hint]}
    return _PRIMITIVES[hint]


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties] if required is None else required}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
