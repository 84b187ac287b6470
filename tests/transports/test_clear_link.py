"""`clear_link`: a link that others can read on the way is warned of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from rig import AT_ONCE, KEY, connect, no_hang, relay_rig, tunnel_entry

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel.testing import open_pioneer_relay
from pioneer_tunnel.transports.clear_link import warn_of_clear_link
from pioneer_tunnel.tunnel.tunnel import open_tunnel

WARNING = "is reached in clear"


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("127.0.0.1", False), ("127.9.9.9", False), ("[::1]", False), ("localhost", False), ("relay.localhost", False),
        ("relay.test", True), ("localhost.test", True), ("192.168.1.1", True), ("0.0.0.0", True), ("[::2]", True),
    ],
)  # fmt: skip
def test_only_a_relay_on_this_host_needs_no_tls(host: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_clear_link(RelayAddress.parse(f"ws://{host}:8080"), instead="a wss:// address")
    assert (WARNING in caplog.text) is warned


@pytest.mark.parametrize("relay", ["ws://relay.test", "ws://localhost"])
async def test_the_native_transport_warns(relay: str, caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig(public_names=["relay.test", "localhost"]) as rig, rig.tunnel(relay=relay) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
    assert [record.levelno for record in caplog.records if WARNING in record.getMessage()] == [logging.WARNING] * (
        "relay.test" in relay
    )


@pytest.mark.parametrize("relay", ["relay.test:1", "localhost:1"])
async def test_the_transport_tcp_warns(relay: str, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        open_pioneer_relay(key=KEY) as pioneer,
        open_tunnel(
            relay, key=KEY, transport="tcp", dial=lambda *_: connect(pioneer.address), restart=AT_ONCE
        ) as tunnel,
    ):
        with no_hang():
            await tunnel.wait_connected()
    assert (WARNING in caplog.text) is ("relay.test" in relay)


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
