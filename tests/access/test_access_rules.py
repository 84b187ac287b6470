"""The table of access rules, and where a relay and a gateway take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rig import relay_config, tunnel_entry

from pioneer_tunnel import Access, InvalidSettingsError, RemoteAccessConfig

PASSWORDS = {"basic_auth": "visitors.htpasswd"}


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"allow": []}, "allow"),
        ({"allow": "192.0.2.0/24"}, "allow"),
        ({"deny": ["192.0.2.1/24"]}, "deny[0]"),
        ({"deny": ["::ffff:192.0.2.7"]}, "deny[0]"),
        ({"deny": ["office.example.com"]}, "deny[0]"),
        ({**PASSWORDS, "bearer_tokens": "tokens"}, "bearer_tokens"),
        ({"open_paths": ["/healthz"]}, "open_paths"),
        ({"preflights": "pass"}, "preflights"),
        ({**PASSWORDS, "preflights": "answer"}, "preflights"),
        ({**PASSWORDS, "realm": "Büro"}, "realm"),
        ({**PASSWORDS, "realm": 'x"\r\nSet-Cookie: a=b'}, "realm"),
        ({**PASSWORDS, "basic_aut": "x"}, "basic_aut"),
        *[
            ({**PASSWORDS, "open_paths": [path]}, "open_paths[0]")
            for path in (
                "healthz",
                "",
                "/a//b",
                "/a/",
                "/a/..",
                "/./a",
                "/a/.../b",
                "/%61",
                "/a;b",
                "/a?b",
                "/a\\b",
                "/ä",
            )
        ],
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidSettingsError) as raised:
        relay_config(tunnels=[tunnel_entry(access=table)])
    assert [problem.key for problem in raised.value.problems] == [f"tunnels[0].access.{key}"]
    with pytest.raises(InvalidSettingsError) as raised:
        RemoteAccessConfig(relay_addr="wss://relay.test", access=table)
    assert [problem.key for problem in raised.value.problems] == [f"access.{key}"]


def test_paths_of_every_plain_kind_may_be_open() -> None:
    access = Access(basic_auth="x", open_paths=["/", "/healthz", "/a/b.c-d_e~f", "/.well-known/x"])
    assert access.open_paths == ("/", "/healthz", "/a/b.c-d_e~f", "/.well-known/x")


@pytest.mark.parametrize("way", [{"bind_addr": "127.0.0.1:0"}, {"tls": "passthrough", "url": "https://office.test"}])
def test_a_relay_cannot_read_passwords_in_other_protocols(way: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingsError, match="HTTP that the relay can read"):
        relay_config(tunnels=[tunnel_entry(**way, access=PASSWORDS)])
    service = {"name": "web", **way, "access": PASSWORDS}
    with pytest.raises(InvalidSettingsError, match="HTTP that the relay can read"):
        relay_config(tunnels=[tunnel_entry(url=None, services=[service])])
    relay_config(tunnels=[tunnel_entry(**way, access={"allow": ["192.0.2.0/24"]})])


def test_each_service_has_its_own_rules() -> None:
    services = [
        {"name": "web", "url": "http://a.test", "access": {"deny": ["192.0.2.7"]}},
        {"name": "x", "url": "http://b.test"},
    ]
    web, other = relay_config(tunnels=[tunnel_entry(url=None, services=services)]).tunnels[0].routes
    assert web.access == Access(deny=["192.0.2.7"])
    assert other.access is None
    with pytest.raises(InvalidSettingsError, match="stands beside services"):
        relay_config(tunnels=[tunnel_entry(url=None, services=services, access={"deny": ["192.0.2.7"]})])


def test_names_below_a_wildcard_have_its_rules() -> None:
    access = {"deny": ["192.0.2.7"]}
    entry = tunnel_entry(url="https://*.box.test", access=access)
    (route,) = relay_config(tunnels=[entry], names_file="names").tunnels[0].routes
    assert route.below("grafana").access == Access(deny=["192.0.2.7"])


@pytest.mark.parametrize(
    "changes",
    [
        {"transport": "tcp", "relay_addr": "relay.test:1", "access": {"allow": ["192.0.2.7"]}},
        {"raw_services": ["ssh"], "access": PASSWORDS},
        {"services": {"ssh": "127.0.0.1:22"}, "raw_services": ["ssh"], "service_access": {"ssh": PASSWORDS}},
        {"service_access": {"ssh": PASSWORDS}},
        {"service_access": {"No": PASSWORDS}},
        {"service_access": [PASSWORDS]},
    ],
)
def test_a_gateway_refuses_rules_that_nothing_would_check(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingsError):
        RemoteAccessConfig(**({"relay_addr": "wss://relay.test"} | changes))


def test_a_gateways_rules_are_by_service_and_have_whole_paths(tmp_path: Path) -> None:
    config = RemoteAccessConfig(
        relay_addr="wss://relay.test",
        services={"ssh": "127.0.0.1:22"},
        access=PASSWORDS,
        service_access={"ssh": {"deny": ["192.0.2.7"]}},
        raw_services=["ssh"],
        base_dir=tmp_path,
    )
    assert config.access_rules == {
        "ssh": Access(deny=["192.0.2.7"]),
        "*": Access(basic_auth=tmp_path / "visitors.htpasswd"),
    }
