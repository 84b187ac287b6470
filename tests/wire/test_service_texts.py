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
    addresses = {"web": "https://t.example", "ssh": "tcp://t.example:22", "": "http://t", "*": "http://*.t.example"}
    found = services.Located(addresses=addresses, refused={"db": "there is none"})
    read = services.located(Message.parse(services.located_text(found)))
    assert read == found
    assert [*read.addresses] == [*addresses]
    hostile = services.Located(addresses={"web": "http://t\x1b[2J\n"}, refused={"db": "\x07"})
    read = services.located(Message.parse(services.located_text(hostile)))
    assert (read.addresses["web"] + read.refused["db"]).isprintable()


@pytest.mark.parametrize("wrong", [None, 1, "web", {}, [1], [None], ["Web"], ["a b"], ["web"] * 65])
def test_malformed_names_are_an_error(wrong: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'serves'"):
        services.serves(Message.parse(json.dumps({"type": "services", "serves": wrong})))


@pytest.mark.parametrize(
    "wrong", [None, 1, "web", [], {"web": 1}, {"Web": "x"}, {f"s{number}": "x" for number in range(129)}]
)
@pytest.mark.parametrize("field", ["addresses", "refused"])
def test_malformed_addresses_are_an_error(field: str, wrong: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=f"'{field}'"):
        services.located(Message.parse(json.dumps({"type": "services", field: wrong})))
