"""Plans: which options reach which transport, and that a transport of the host's own changes no check."""

from __future__ import annotations

from typing import Any, NoReturn

import attrs
import pytest

from pioneer_tunnel._model.errors import InvalidSettingsError, MissingKeyError
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._net.dialing import dial_tcp
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.planning import Plan, make_plan
from pioneer_tunnel.transports import Serve
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.transports.native import NativeTransport
from pioneer_tunnel.transports.rathole.control_channel import RatholeTransport
from pioneer_tunnel.transports.rathole.key_mode import KeyMode
from pioneer_tunnel.yamux import Limits

KEY = RelayKey("x" * 20)
WEAK = RelayKey("weak")
LIMITS = Limits(streams=7)


async def own(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("nothing is dialled here")


def plan(config: RemoteAccessConfig, key: RelayKey | None = KEY, serve: Serve | None = None) -> Plan:
    serve = serve or TRANSPORTS[config.effective_transport]
    return make_plan(config, serve, key, instance="0", dial=dial_tcp, limits=LIMITS, services=None)


def test_a_transport_has_its_own_options() -> None:
    relay = SigningIdentity.generate().public_key
    config = RemoteAccessConfig(relay_addr="wss://relay.example", relay_identity=relay)
    assert plan(config).serve == NativeTransport(relay_identity=relay, limits=LIMITS)
    for transport in ("tcp", "tls"):
        config = RemoteAccessConfig(relay_addr="relay.example:1", transport=transport, key_mode="rathole")
        expected = RatholeTransport(tls=transport == "tls", key_mode=KeyMode.RATHOLE, max_streams=7)
        assert plan(config, WEAK).serve == expected


def test_a_transport_of_the_hosts_own_is_called_as_it_is_after_the_same_checks() -> None:
    config = RemoteAccessConfig(relay_addr="wss://relay.example")
    assert plan(config, serve=own).serve is own
    with pytest.raises(MissingKeyError):
        plan(config, None, own)
    with pytest.raises(InvalidSettingsError, match="shorter"):
        plan(config, WEAK, own)
    with pytest.raises(InvalidSettingsError, match=r"gateway\.remote_access\.process"):
        plan(RemoteAccessConfig(transport="process"), serve=own)


def test_a_transport_that_this_library_lacks_may_be_the_hosts_own() -> None:
    config = RemoteAccessConfig(transport="noise")
    assert plan(config, WEAK, own).serve is own
    with pytest.raises(MissingKeyError):
        plan(config, None, own)


def test_the_proxy_of_the_environment_is_for_the_dialer_of_this_library(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RemoteAccessConfig(relay_addr="wss://relay.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    chosen = plan(config).target.proxy.proxy_for("relay.example", 443)
    assert chosen is not None
    assert (str(chosen.proxy), chosen.variable) == ("http://proxy.example:3128", "HTTPS_PROXY")
    with_own = make_plan(config, TRANSPORTS["websocket"], KEY, instance="0", dial=own, limits=LIMITS, services=None)
    assert with_own.target.proxy.proxy_for("relay.example", 443) is None
    monkeypatch.setenv("HTTPS_PROXY", "gopher://proxy.example")
    with pytest.raises(InvalidSettingsError, match="HTTPS_PROXY"):
        plan(config)
    assert plan(attrs.evolve(config, proxy="none")).target.proxy.proxy_for("relay.example", 443) is None
    program = RemoteAccessConfig(transport="process", process={"command": ["x"]})
    assert plan(program).config == program, "what the environment means to a program is for the program to say"
