"""The extension `certificate`, through the handshake of both sides."""

from __future__ import annotations

from typing import Any

import pytest
from rig import KEY, RELAY_NAME

from pioneer_tunnel._model.errors import RelayConnectError, RemoteProtocolError
from pioneer_tunnel._wire.certificate import (
    CERTIFICATE,
    choose_certificate,
    offer_certificate,
    sees_another_certificate,
)
from pioneer_tunnel._wire.handshake import Claim, GatewayHandshake, RelayHandshake
from pioneer_tunnel._wire.messages import Choose

OWN, ANOTHER = bytes(32), bytes([1] * 32)


def claimed(choose: Choose, offer: Any) -> Claim:
    gateway = GatewayHandshake(KEY.identity(), audience=RELAY_NAME, service="s", choices={CERTIFICATE: choose})
    relay = RelayHandshake("r", public_names=[RELAY_NAME], offers={CERTIFICATE: offer})
    answer = gateway.receive(relay.challenge)
    assert isinstance(answer, str)
    claim = relay.receive(answer)
    assert claim is not None
    relay.verify(claim, KEY.identity().public_key)
    return claim


@pytest.mark.parametrize("seen", [OWN, ANOTHER])
def test_both_ends_notice_another_certificate(seen: bytes) -> None:
    noticed: list[str] = []
    claim = claimed(choose_certificate(seen, lambda: noticed.append("another")), offer_certificate(OWN))
    assert claim.extensions[CERTIFICATE].fields == {"sha256": seen.hex()}
    assert sees_another_certificate(claim.extensions, OWN) == bool(noticed) == (seen == ANOTHER)


def test_a_gateway_without_tls_does_without() -> None:
    claim = claimed(choose_certificate(None, pytest.fail), offer_certificate(OWN))
    assert CERTIFICATE not in claim.extensions
    assert not sees_another_certificate(claim.extensions, OWN)


def test_malformed_words_are_named() -> None:
    with pytest.raises(RelayConnectError, match="'sha256'"):
        claimed(choose_certificate(OWN, pytest.fail), {})
    claim = claimed(lambda _: {"sha256": 1}, offer_certificate(OWN))
    with pytest.raises(RemoteProtocolError, match="'sha256'"):
        sees_another_certificate(claim.extensions, OWN)
