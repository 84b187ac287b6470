"""The extension `services`: names and addresses on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._wire import services
from pioneer_tunnel._wire.messages import Message


def test_what_a_gateway_serves_is_read_as_it_was_written() -> None:
    for names in (frozenset[str](), frozenset({"", "web", "a.b-c_d"}), frozenset(f"s{n}" for n in range(64))):
        assert services.serves(Message.parse(services.serves_text(names))) == names


def test_addresses_keep_their_order_and_cannot_steer_a_terminal() -> None:
    addresses = {"web": "https://t.example", "ssh": "tcp://t.example:22", "": "http://t"}
    assert [*services.addresses(Message.parse(services.addresses_text(addresses))).items()] == [*addresses.items()]
    hostile = services.addresses(Message.parse(services.addresses_text({"web": "http://t\x1b[2J\n"})))
    assert hostile["web"].isprintable()


@pytest.mark.parametrize("wrong", [None, 1, "web", {}, [1], [None], ["Web"], ["a b"], ["web"] * 65])
def test_malformed_names_are_an_error(wrong: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'serves'"):
        services.serves(Message.parse(json.dumps({"type": "services", "serves": wrong})))


@pytest.mark.parametrize(
    "wrong", [None, 1, "web", [], {"web": 1}, {"Web": "x"}, {f"s{number}": "x" for number in range(65)}]
)
def test_malformed_addresses_are_an_error(wrong: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'addresses'"):
        services.addresses(Message.parse(json.dumps({"type": "services", "addresses": wrong})))
