"""A relay, or a link to one, that others can read on the way is warned of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from rig import no_hang, relay_rig, tunnel_entry

WARNING = "is reached in clear"


@pytest.mark.parametrize("relay", ["ws://relay.test", "ws://localhost"])
async def test_the_native_transport_warns(relay: str, caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig(public_names=["relay.test", "localhost"]) as rig, rig.tunnel(relay=relay) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
    assert [record.levelno for record in caplog.records if WARNING in record.getMessage()] == [logging.WARNING] * (
        "relay.test" in relay
    )


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, []),
        ({"control_addr": "0.0.0.0:0"}, ["gateways"]),
        ({"ingress_addr": ["127.0.0.1:0", "0.0.0.0:0"]}, ["visitors"]),
        ({"control_addr": "0.0.0.0:0", "ingress_addr": "0.0.0.0:0"}, ["gateways", "visitors"]),
    ],
)
async def test_a_public_relay_without_tls_warns(
    changes: dict[str, Any], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with relay_rig(**changes):
        pass
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split()[0] for line in said] == warned
    assert all("0.0.0.0:" in line and "127.0.0.1" not in line and "without TLS" in line for line in said)


async def test_visitors_who_bring_their_own_tls_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    passing = tunnel_entry(url="https://office.test", tls="passthrough")
    async with relay_rig(ingress_addr="0.0.0.0:0", tunnels=[passing]):
        pass
    assert "without TLS" not in caplog.text
