"""The schema in docs/ is the one that the types make, and real messages are valid by it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings, strategies as st

from pioneer_tunnel.identity import RelayKey
from pioneer_tunnel.json_schema import json_schema
from pioneer_tunnel.jsonrpc import STATUS_CHANGED
from pioneer_tunnel.settings import SettingsUpdate
from pioneer_tunnel.snapshot import Snapshot
from pioneer_tunnel.status import ErrorKind, State, Status

SCHEMA: Final = json_schema()
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
_KNOWN: Final = {"$ref", "type", "enum", "properties", "required", "minLength", "maxLength", "writeOnly"}


def problems(value: object, schema: Mapping[str, Any], path: str = "") -> list[str]:
    """What is wrong with `value`: as much of JSON Schema as ours uses, and an error for what goes beyond that."""
    assert schema.keys() <= _KNOWN, f"this check does not know {schema.keys() - _KNOWN}"
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fitting = [name for name in names if isinstance(value, _TYPES[name])]
    if isinstance(value, bool) and "boolean" not in names:
        fitting = []
    found = [] if fitting else [f"{path} is {value!r}, not of type {names}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path} is {value!r}, none of {schema['enum']}")
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        found.append(f"{path} has {len(value)} characters")
    if isinstance(value, dict):
        found += [f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, each in schema.get("properties", {}).items():
            if name in value:
                found += problems(value[name], each, f"{path}.{name}")
    return found


def problems_with(name: str, value: object) -> list[str]:
    return problems(value, {"$ref": f"#/$defs/{name}"})


def test_the_copy_in_docs_is_the_one_that_the_types_make() -> None:
    copy = Path(__file__).parent.parent / "docs" / "remote-access.schema.json"
    made = subprocess.run(
        [sys.executable, "-m", "pioneer_tunnel.json_schema"], check=True, capture_output=True, text=True
    )
    assert json.loads(copy.read_text()) == SCHEMA
    assert copy.read_text() == made.stdout


def test_closed_lists_are_those_of_the_contract() -> None:
    status, snapshot = SCHEMA["$defs"]["STATUS"]["properties"], SCHEMA["$defs"]["SNAPSHOT"]["properties"]
    assert status["state"]["enum"] == ["disabled", "starting", "connected", "reconnecting", "failed", "stopped"]
    assert set(status["error_kind"]["enum"]) == {
        "invalid_settings",
        "missing_key",
        "missing_binary",
        "local_gateway_unavailable",
        "relay_resolve_failed",
        "relay_connect_failed",
        "tunnel_auth_failed",
        "process_exited",
        "unsupported_transport",
        "restart_limit_reached",
        "io",
        "unknown",
    }
    assert snapshot["transport"]["enum"] == ["tcp", "tls", "noise", "websocket"]


def test_fields_are_those_of_the_contract() -> None:
    definitions = SCHEMA["$defs"]
    assert definitions.keys() == {
        "STATUS",
        "SNAPSHOT",
        "UPDATE",
        "settings/get",
        "settings/update",
        "gateway/remote_access/status_changed",
    }
    assert definitions["STATUS"]["required"] == ["state"]
    assert definitions["STATUS"]["properties"].keys() == {
        "state",
        "error_kind",
        "message",
        "updated_at_unix",
        "public_url",
        "attempt",
        "retry_at_unix",
        "relay_rtt_ms",
    }
    assert definitions["SNAPSHOT"]["required"] == ["enabled", "transport", "has_key", "status"]
    assert definitions["SNAPSHOT"]["properties"].keys() == {
        "enabled",
        "server",
        "service_name",
        "transport",
        "transport_detail",
        "has_key",
        "status",
    }
    assert definitions["UPDATE"]["required"] == []
    assert definitions["UPDATE"]["properties"].keys() == {"enabled", "server", "key", "clear_key"}
    assert definitions["UPDATE"]["properties"]["key"]["writeOnly"]


statuses = st.builds(
    Status,
    state=st.sampled_from(State),
    error_kind=st.one_of(st.none(), st.sampled_from(ErrorKind)),
    message=st.one_of(st.none(), st.text(max_size=1000)),
    updated_at_unix=st.one_of(st.none(), st.integers(0, 2**40)),
    public_url=st.one_of(st.none(), st.just("https://office.example.com")),
    attempt=st.one_of(st.none(), st.integers(1, 10**6)),
    retry_at_unix=st.one_of(st.none(), st.integers(0, 2**40)),
    relay_rtt_ms=st.one_of(st.none(), st.floats(0, 10**6)),
)


@settings(deadline=None, derandomize=True)
@given(status=statuses)
def test_every_status_is_valid(status: Status) -> None:
    wire = json.loads(json.dumps(status.to_wire()))
    assert problems_with("STATUS", wire) == []
    assert problems_with(STATUS_CHANGED, {"params": {"status": wire}}) == []
    assert Status.from_wire(wire) == status


@settings(deadline=None, derandomize=True)
@given(
    snapshot=st.builds(
        Snapshot,
        enabled=st.booleans(),
        server=st.one_of(st.none(), st.just("wss://relay.example.com")),
        transport=st.sampled_from(["tcp", "tls", "noise", "websocket"]),
        transport_detail=st.sampled_from([None, "process"]),
        has_key=st.booleans(),
        status=statuses,
    )
)
def test_every_snapshot_is_valid(snapshot: Snapshot) -> None:
    wire = json.loads(json.dumps(snapshot.to_wire()))
    assert problems_with("SNAPSHOT", wire) == []
    assert None not in wire.values()


anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just({}), st.just([]))
fields = st.fixed_dictionaries(
    {},
    optional={
        "enabled": anything,
        "server": st.one_of(anything, st.just("s" * 513)),
        "key": st.one_of(anything, st.just("k" * 4097), st.just("k" * 4096)),
        "clear_key": anything,
        "of_a_newer_client": anything,
    },
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(update=fields)
def test_what_is_accepted_as_an_update_is_what_the_schema_allows(update: dict[str, object]) -> None:
    """Less what a schema cannot say: white space is trimmed before it counts, and control characters are refused."""
    try:
        accepted = SettingsUpdate.from_wire(update)
    except ValueError as error:
        key = update.get("key")
        unsaid = isinstance(key, str) and (not key.strip() or "key" in str(error)) and len(key) <= 4096
        server = update.get("server")
        unsaid = unsaid or (isinstance(server, str) and any("\ud800" <= char <= "\udfff" for char in server))
        assert problems_with("UPDATE", update) or unsaid
    else:
        assert problems_with("UPDATE", update) == []
        assert accepted.key is None or isinstance(accepted.key, RelayKey)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STATUS", {}),
        ("STATUS", {"state": "draining"}),
        ("STATUS", {"state": "failed", "error_kind": None}),
        ("STATUS", {"state": "failed", "message": "m" * 301}),
        ("STATUS", {"state": "failed", "attempt": True}),
        ("SNAPSHOT", {"enabled": True, "transport": "process", "has_key": True, "status": {"state": "disabled"}}),
        ("SNAPSHOT", {"enabled": True, "transport": "tcp", "status": {"state": "disabled"}}),
        ("UPDATE", {"enabled": "yes"}),
        ("UPDATE", {"key": ""}),
        ("settings/update", {"params": {}, "result": {"settings": {}}}),
    ],
)
def test_what_breaks_the_contract_is_not_valid(name: str, value: object) -> None:
    assert problems_with(name, value)
