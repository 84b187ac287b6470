"""The extension `heartbeat`, through the handshake of both sides."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rig import KEY, RELAY_NAME

from pioneer_tunnel._model.errors import RelayConnectError, RemoteProtocolError
from pioneer_tunnel._wire.handshake import GatewayHandshake, RelayHandshake, Welcome
from pioneer_tunnel._wire.heartbeat import HEARTBEAT, agreed_heartbeat, choose_heartbeat, offer_heartbeat


def negotiated(wanted: float | None, relay_ms: int, *, relay_knows: bool = True, gateway_knows: bool = True) -> Welcome:
    """What a gateway and a relay agree on."""
    gateway = GatewayHandshake(
        KEY.identity(),
        audience=RELAY_NAME,
        service="s",
        choices={HEARTBEAT: choose_heartbeat(wanted)} if gateway_knows else None,
    )
    relay = RelayHandshake(
        "r", public_names=[RELAY_NAME], offers={HEARTBEAT: offer_heartbeat(relay_ms)} if relay_knows else None
    )
    answer = gateway.receive(relay.challenge)
    assert isinstance(answer, str)
    claim = relay.receive(answer)
    assert claim is not None
    relay.verify(claim, KEY.identity().public_key)
    heartbeat_ms = agreed_heartbeat(claim.extensions, relay_ms)
    welcome = gateway.receive(
        relay.welcome(
            claim,
            session="s",
            public_url="u",
            heartbeat_ms=heartbeat_ms,
            confirmed={name: {} for name in claim.extensions},
        )
    )
    assert isinstance(welcome, Welcome)
    return welcome


@pytest.mark.parametrize(
    ("wanted", "relay_ms", "agreed"),
    [(None, 60_000, 60), (10, 60_000, 10), (10.5, 60_000, 10.5), (20, 15_000, 15), (15, 15_000, 15), (0.1, 9_000, 1)],
)
def test_the_shorter_heartbeat_counts(wanted: float | None, relay_ms: int, agreed: float) -> None:
    welcome = negotiated(wanted, relay_ms)
    assert welcome.heartbeat == agreed
    assert (HEARTBEAT in welcome.extensions) == (agreed * 1000 < relay_ms)


@pytest.mark.parametrize(("relay_knows", "gateway_knows"), [(False, True), (True, False)])
def test_with_a_peer_that_does_not_know_the_extension_the_relay_decides(relay_knows: bool, gateway_knows: bool) -> None:
    welcome = negotiated(5, 60_000, relay_knows=relay_knows, gateway_knows=gateway_knows)
    assert welcome.heartbeat == 60
    assert welcome.extensions == {}


@pytest.mark.parametrize("offered", [{}, {"min_ms": 1}, {"max_ms": 9}, {"min_ms": "1", "max_ms": 9}])
def test_a_malformed_offer_is_named(offered: dict[str, Any]) -> None:
    gateway = GatewayHandshake(
        KEY.identity(), audience=RELAY_NAME, service="s", choices={HEARTBEAT: choose_heartbeat(5)}
    )
    challenge = RelayHandshake("r", public_names=[RELAY_NAME], offers={HEARTBEAT: offered}).challenge
    with pytest.raises(RelayConnectError, match=r"m(in|ax)_ms"):
        gateway.receive(challenge)


@pytest.mark.parametrize("chosen", [{}, {"ms": "5"}, {"ms": True}, {"ms": 1e300}])
def test_a_malformed_choice_is_named(chosen: dict[str, Any]) -> None:
    gateway = GatewayHandshake(KEY.identity(), audience=RELAY_NAME, service="s", choices={HEARTBEAT: lambda _: chosen})
    relay = RelayHandshake("r", public_names=[RELAY_NAME], offers={HEARTBEAT: offer_heartbeat(60_000)})
    answer = gateway.receive(relay.challenge)
    assert isinstance(answer, str)
    assert json.loads(answer)["extensions"] == {HEARTBEAT: chosen}
    claim = relay.receive(answer)
    assert claim is not None
    with pytest.raises(RemoteProtocolError, match="'ms'"):
        agreed_heartbeat(claim.extensions, 60_000)


@pytest.mark.parametrize("asked", [-5, 0, 10**9])
def test_a_gateway_cannot_ask_for_more_than_was_offered(asked: int) -> None:
    gateway = GatewayHandshake(
        KEY.identity(), audience=RELAY_NAME, service="s", choices={HEARTBEAT: lambda _: {"ms": asked}}
    )
    relay = RelayHandshake("r", public_names=[RELAY_NAME], offers={HEARTBEAT: offer_heartbeat(60_000)})
    answer = gateway.receive(relay.challenge)
    assert isinstance(answer, str)
    claim = relay.receive(answer)
    assert claim is not None
    assert 1000 <= agreed_heartbeat(claim.extensions, 60_000) <= 60_000
