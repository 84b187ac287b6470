"""The JSON Schema in docs/ names what the types have, and real messages are valid by it."""

from __future__ import annotations

import json

import attrs
import pytest
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from jsonschema import Draft202012Validator
from schema import SCHEMA, problems_with

from pioneer_tunnel._model.certificate_status import CertificateStatus
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel.gateway.rpc import STATUS_CHANGED
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.gateway.snapshot import Snapshot


def test_the_document_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("name", "cls"), [("STATUS", Status), ("SNAPSHOT", Snapshot), ("UPDATE", SettingsUpdate)])
def test_it_has_the_fields_that_the_types_have(name: str, cls: type[attrs.AttrsInstance]) -> None:
    assert [*SCHEMA["$defs"][name]["properties"]] == [field.name for field in attrs.fields(cls)]
    required = [field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING]
    assert SCHEMA["$defs"][name]["required"] == required


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
        "services",
        "certificates",
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


certificates = st.builds(
    CertificateStatus,
    not_after_unix=st.none() | st.integers(0, 2**40),
    renew_at_unix=st.none() | st.integers(0, 2**40),
    message=st.none() | st.text(max_size=1000),
    retry_at_unix=st.none() | st.integers(0, 2**40),
)
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
    certificates=st.none() | st.dictionaries(st.text(max_size=9), certificates, max_size=3),
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


@settings(deadline=None, derandomize=True, max_examples=examples(500))
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
