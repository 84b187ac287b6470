"""The extension `links`, through the handshake of both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from rig import KEY, RELAY_NAME

from pioneer_tunnel._model.errors import RelayConnectError, RemoteProtocolError
from pioneer_tunnel._wire.handshake import Claim, GatewayHandshake, RelayHandshake
from pioneer_tunnel._wire.links import LINKS, LinkPlace, choose_links, link_place, offer_links

VECTORS: Final = json.loads((Path(__file__).parents[1] / "vectors" / "native-links.json").read_text())


def claimed(choose: Any, offer: dict[str, Any] | None) -> Claim:
    """What a gateway claims to a relay."""
    gateway = GatewayHandshake(
        KEY.identity(), audience=RELAY_NAME, service="s", choices=None if choose is None else {LINKS: choose}
    )
    relay = RelayHandshake("r", public_names=[RELAY_NAME], offers=None if offer is None else {LINKS: offer})
    answer = gateway.receive(relay.challenge)
    assert isinstance(answer, str)
    claim = relay.receive(answer)
    assert claim is not None
    return claim


@pytest.mark.parametrize("vector", VECTORS["negotiations"])
def test_each_link_says_which_it_is(vector: dict[str, Any]) -> None:
    """An offer of null is a relay without the extension; a choice of null is a gateway that does without it."""
    place = LinkPlace(**vector["place"])
    claim = claimed(choose_links(place), vector["offer"])
    assert (dict(claim.extensions[LINKS].fields) if LINKS in claim.extensions else None) == vector["chosen"]
    assert link_place(claim.extensions) == (None if vector["chosen"] is None else place)


def test_the_offer_is_that_of_the_vectors() -> None:
    assert offer_links() == VECTORS["negotiations"][0]["offer"]


def test_a_gateway_with_one_link_does_not_choose_it() -> None:
    assert link_place(claimed(None, dict(offer_links())).extensions) is None


@pytest.mark.parametrize("chosen", VECTORS["malformed"])
def test_a_malformed_choice_is_refused(chosen: dict[str, Any]) -> None:
    claim = claimed(lambda _: chosen, dict(offer_links()))
    with pytest.raises(RemoteProtocolError, match=r"index|of"):
        link_place(claim.extensions)


@pytest.mark.parametrize("offer", [{}, {"most": "8"}, {"most": True}])
def test_a_malformed_offer_is_named(offer: dict[str, Any]) -> None:
    with pytest.raises(RelayConnectError, match="most"):
        claimed(choose_links(LinkPlace(0, 2)), offer)
