"""`[[relay.tunnels]]`: the keys and services of a tunnel, and what two tunnels may not share."""

from __future__ import annotations

from typing import Any

import pytest
from relay_problems import key, only_problem_of, problems_of, relay, tunnel

from pioneer_tunnel._model.keys import PublicKey
from pioneer_tunnel.relay import RelayConfig
from pioneer_tunnel.relay.gateways.takeover import Takeover

# Keys, and who has the tunnel


def test_one_key_or_several() -> None:
    one, several, _ = RelayConfig.from_table(relay(tunnel(1), rotating(2, 3, 4), rotating(5, 5))).tunnels
    assert one.valid_keys == (PublicKey.parse(key(1)),)
    assert several.valid_keys == tuple(PublicKey.parse(key(number)) for number in (3, 4))
    assert several.key is None
    assert several.keys_by_id == {valid.key_id: valid for valid in several.valid_keys}
    assert several.takeover_rules.keys == tuple(valid.key_id for valid in several.valid_keys)


def rotating(number: int, *keys: int, **other: Any) -> dict[str, Any]:
    """The table of a tunnel with `keys`."""
    table = tunnel(number, keys=[key(each) for each in keys])
    del table["key"]
    return table | other


def test_a_key_beside_keys_is_one_too_many() -> None:
    problem = only_problem_of(relay(rotating(1, 2, 3, key=key(1))))
    assert problem.key == "relay.tunnels[0].key"
    assert "keys" in problem.message
    assert problem.value is None


@pytest.mark.parametrize("keys", [[], "ed25519:", key(1), 3, [key(number) for number in range(9)]], ids=repr)
def test_keys_are_one_to_eight(keys: object) -> None:
    problem = only_problem_of(relay(rotating(1, keys=keys)))
    assert problem.key == "relay.tunnels[0].keys"
    assert "1 to 8" in problem.message


def test_each_of_the_keys_is_told_by_itself_and_none_is_shown() -> None:
    secret = "ptk1_the-secret-half-by-mistake-0123456789"
    problems = problems_of(relay(rotating(1, keys=[key(1), secret, 3, key(1)])))
    assert [problem.key for problem in problems] == [f"relay.tunnels[0].keys[{index}]" for index in (1, 2, 3)]
    assert "[0]" in problems[2].message
    assert not any(secret in str(problem) or (problem.value or "") for problem in problems)


@pytest.mark.parametrize(
    ("first", "second", "at", "there"),
    [
        (tunnel(1), rotating(2, 3, 1), "relay.tunnels[1].keys[1]", "tunnels[0].key "),
        (rotating(1, 2, 3), tunnel(3), "relay.tunnels[1].key", "tunnels[0].keys[1] "),
        (rotating(1, 2, 3), rotating(4, 5, 2), "relay.tunnels[1].keys[1]", "tunnels[0].keys[0] "),
    ],
)
def test_a_key_belongs_to_one_tunnel_wherever_it_stands(
    first: dict[str, Any], second: dict[str, Any], at: str, there: str
) -> None:
    problem = only_problem_of(relay(first, second))
    assert problem.key == at
    assert there in problem.message


def test_who_has_the_tunnel_is_a_word_of_two() -> None:
    newest, first = RelayConfig.from_table(relay(tunnel(1), tunnel(2, takeover="first"))).tunnels
    assert (newest.takeover, first.takeover) == (Takeover.NEWEST, Takeover.FIRST)
    for wrong in ("last", "", 3, True):
        problem = only_problem_of(relay(tunnel(1, takeover=wrong)))
        assert problem.key == "relay.tunnels[0].takeover"
        assert "'newest' and 'first'" in problem.message


# What two tunnels may not share


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("id", {"id": "t1"}),
        ("key", {"key": key(1)}),
        ("key", {"key": key(1).replace(key(1)[8:], key(1)[8:].upper())}),
        ("url", {"url": "https://t1.example"}),
        ("url", {"url": "http://T1.example.:8080/"}),
    ],
)
def test_a_duplicate_names_both_entries(name: str, other: dict[str, str]) -> None:
    problem = only_problem_of(relay(tunnel(0), tunnel(1), tunnel(2, **other)))
    assert problem.key == f"relay.tunnels[2].{name}"
    assert "tunnels[1]" in problem.message


def test_each_bind_addr_is_taken_once() -> None:
    problem = only_problem_of(relay(tunnel(1, bind_addr="[::1]:22"), tunnel(2, bind_addr="[0::1]:22")))
    assert problem.key == "relay.tunnels[1].bind_addr"
    assert "tunnels[0]" in problem.message


def test_port_0_is_another_port_each_time() -> None:
    config = relay(
        tunnel(1, bind_addr="[::1]:0"), tunnel(2, bind_addr="[::1]:0"), control_addr="[::1]:0", ingress_addr="[::1]:0"
    )
    assert len(RelayConfig.from_table(config).tunnels) == 2


@pytest.mark.parametrize("name", ["control_addr", "ingress_addr"])
def test_a_bind_addr_is_not_one_of_the_relays_own(name: str) -> None:
    table = relay(tunnel(1, bind_addr="127.0.0.1:9000"), **{name: "127.0.0.1:9000"})
    problem = only_problem_of(table)
    assert "tunnels[0].bind_addr" in problem.message
    assert name in problem.message


def test_a_url_may_be_shared_where_visitors_are_told_apart_by_the_port() -> None:
    url = "https://t1.example"
    config = relay(tunnel(1), tunnel(2, url=url, bind_addr="0.0.0.0:1"), tunnel(3, url=url, bind_addr="0.0.0.0:2"))
    assert len(RelayConfig.from_table(config).tunnels) == 3


# Services


def with_services(*services: Any, number: int = 1, **changes: Any) -> dict[str, Any]:
    entry = tunnel(number, services=[*services], **changes)
    return {name: value for name, value in entry.items() if name != "url" or "url" in changes}


WEB = {"name": "web", "url": "https://t1.example"}
SSH = {"name": "ssh", "bind_addr": "127.0.0.1:2222"}


def test_a_tunnel_has_a_route_for_each_service() -> None:
    (entry,) = RelayConfig.from_table(relay(with_services(WEB, SSH))).tunnels
    assert [(route.service, route.first, route.host) for route in entry.routes] == [
        ("web", True, "t1.example"),
        ("ssh", False, None),
    ]
    (single,) = RelayConfig.from_table(relay(tunnel(1))).tunnels
    assert [(route.service, route.first, route.url) for route in single.routes] == [(None, True, single.url)]


@pytest.mark.parametrize(
    ("service", "at", "told"),
    [
        ({"name": "web"}, "url", "a service has a url, a bind_addr, or both"),
        (WEB | {"name": "Web"}, "name", "lower-case letters"),
        (WEB | {"name": ""}, "name", "lower-case letters"),
        (WEB | {"name": 3}, "name", "lower-case letters"),
        (WEB | {"tls": "passthru"}, "tls", "'terminate' and 'passthrough'"),
        (WEB | {"url": "http://t1.example", "tls": "passthrough"}, "tls", "https://"),
        (SSH | {"tls": "passthrough"}, "tls", "passes everything through"),
        (WEB | {"colour": "red"}, "colour", "unknown key"),
        ({"url": "https://t1.example"}, "name", "is missing"),
        (SSH | {"bind_addr": "[::1]:99"}, "bind_addr", "control_addr"),
    ],
)
def test_what_is_wrong_with_a_service_is_named(service: dict[str, Any], at: str, told: str) -> None:
    table = relay(with_services(WEB | {"name": "first", "url": "https://first.example"}, service))
    table["control_addr"] = "[::1]:99"
    problem = only_problem_of(table)
    if told == "control_addr":
        assert "tunnels[0].services[1].bind_addr is control_addr too" in problem.message
    else:
        assert problem.key == f"relay.tunnels[0].services[1].{at}"
        assert told in problem.message


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"url": "https://t1.example"}, "url"),
        ({"bind_addr": "127.0.0.1:22"}, "bind_addr"),
        ({"tls": "passthrough"}, "tls"),
    ],
)
def test_the_single_form_does_not_stand_beside_services(changes: dict[str, Any], at: str) -> None:
    problem = only_problem_of(relay(with_services(WEB | {"url": "https://web.example"}, **changes)))
    assert problem.key == f"relay.tunnels[0].{at}"
    assert "stands beside services" in problem.message


@pytest.mark.parametrize(
    ("second", "at", "there"),
    [
        (with_services(WEB, number=2), "[1].services[0].url", "tunnels[0].services[0].url"),
        (with_services(SSH, number=2), "[1].services[0].bind_addr", "tunnels[0].services[1].bind_addr"),
        (tunnel(2, url="http://t1.example"), "[1].url", "tunnels[0].services[0].url"),
        (tunnel(2, bind_addr="127.0.0.1:2222"), "[1].bind_addr", "tunnels[0].services[1].bind_addr"),
    ],
)
def test_what_a_service_claims_is_claimed_once(second: dict[str, Any], at: str, there: str) -> None:
    problem = only_problem_of(relay(with_services(WEB, SSH), second))
    assert problem.key == f"relay.tunnels{at}"
    assert f"stands in {there} too" in problem.message or f"stands in {there.partition('.')[0]} too" in problem.message


def test_two_services_of_a_tunnel_share_nothing() -> None:
    same_name = only_problem_of(relay(with_services(WEB, SSH | {"name": "web"})))
    assert same_name.key == "relay.tunnels[0].services[1].name"
    same_host = only_problem_of(relay(with_services(WEB, WEB | {"name": "api"})))
    assert same_host.key == "relay.tunnels[0].services[1].url"


def test_a_tunnel_has_64_services_at_most() -> None:
    services = [{"name": f"s{number}", "url": f"https://s{number}.example"} for number in range(65)]
    assert len(RelayConfig.from_table(relay(with_services(*services[:64]))).tunnels[0].routes) == 64
    assert "64 services" in only_problem_of(relay(with_services(*services))).message
