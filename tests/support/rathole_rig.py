"""The transports `tcp` and `tls` against the scripted relay, in each way in which a data channel may come about."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import trustme
from fast_path import switch_fast_path_off
from rig import AT_ONCE, HANG, no_hang

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net import adopted as streams, dialing as dialer
from pioneer_tunnel._net.dialing import Attempt
from pioneer_tunnel.testing import ScriptedPioneerRelay, open_pioneer_relay
from pioneer_tunnel.transports.rathole import data_channels
from pioneer_tunnel.transports.rathole.codec import ControlCommand, encode_command
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

Test = TypeVar("Test", bound=Callable[..., object])

KEY = RelayKey("weak")  # these transports take any key
CREATE = encode_command(ControlCommand.CREATE_DATA_CHANNEL)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def comes_about(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a data channel comes about, and waits for its visitor."""
    way: str = request.param
    if way != "at once":
        monkeypatch.setattr(Attempt, "at_once", lambda self: None)
    if way in {"a task for each", "no descriptors"}:
        switch_fast_path_off(monkeypatch)
    if way == "no descriptors":
        for module in (dialer, streams):
            monkeypatch.setattr(module, "CAN_USE_DESCRIPTORS", False)


def in_ways(*ways: str) -> Callable[[Test], Test]:
    """Run a test with data channels that come about in each of `ways`."""

    def decorate(test: Test) -> Test:
        parametrized = pytest.mark.parametrize("comes_about", ways, indirect=True)(test)
        decorated: Test = pytest.mark.usefixtures("comes_about")(parametrized)
        return decorated

    return decorate


every_way: Final = in_ways("at once", "in a while", "a task for each", "no descriptors")


@pytest.fixture(params=["tcp", "tls"])
def secured(request: pytest.FixtureRequest, ca: trustme.CA, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the relay and the tunnel have to know for each of the two transports."""
    if request.param == "tcp":
        return {}, {"transport": "tcp"}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    return {"tls": context}, {"transport": "tls", "ca_file": file}


def a_tunnel(relay: ScriptedPioneerRelay, **changes: Any) -> Any:
    settings: dict[str, Any] = {"key": KEY, "transport": "tcp", "restart": AT_ONCE, "connect_timeout": HANG}
    return open_tunnel(str(relay.address), **(settings | changes))


@asynccontextmanager
async def connected(
    secured: tuple[dict[str, Any], dict[str, Any]] = ({}, {}), **changes: Any
) -> AsyncIterator[tuple[ScriptedPioneerRelay, Tunnel]]:
    async with open_pioneer_relay(key=KEY, **secured[0]) as relay, a_tunnel(relay, **secured[1], **changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield relay, tunnel


ADDRESS = RelayAddress.parse("relay.test:2333")


@pytest.fixture
def few_idle(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many data channels may be idle at once: fewer than usual, so that a test comes to that bound soon."""
    monkeypatch.setattr(data_channels, "MOST_IDLE", 40)
    return 40
