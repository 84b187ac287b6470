"""`[gateway.remote_access]`: which transport, local server, proxy and relays go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from configs import PIN, refused, write

from pioneer_tunnel._model.addresses import HttpsAddress, UnixAddress
from pioneer_tunnel._model.errors import InvalidSettingsError, UnsupportedTransportError
from pioneer_tunnel._model.proxies import Proxy
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.transport import Transport

# Transports


@pytest.mark.parametrize(
    ("relay_addr", "transport", "effective", "dialled"),
    [
        ("relay.example:2333", None, Transport.TCP, "relay.example:2333"),
        ("ws://relay.example", None, Transport.WEBSOCKET, "ws://relay.example"),
        ("wss://relay.example", None, Transport.WEBSOCKET, "wss://relay.example"),
        ("relay.example:2333", "websocket", Transport.WEBSOCKET, "wss://relay.example:2333"),
        ("relay.example:443", "websocket", Transport.WEBSOCKET, "wss://relay.example"),
        ("ws://relay.example", "websocket", Transport.WEBSOCKET, "ws://relay.example"),
        ("relay.example:2333", "tcp", Transport.TCP, "relay.example:2333"),
        ("relay.example:2333", "tls", Transport.TLS, "relay.example:2333"),
        ("relay.example:2333", "noise", Transport.NOISE, "relay.example:2333"),
        ("wss://relay.example", "noise", Transport.NOISE, "wss://relay.example"),
        ("relay.example:2333", "process", Transport.PROCESS, "relay.example:2333"),
        ("wss://relay.example", "process", Transport.PROCESS, "wss://relay.example"),
    ],
)
def test_transport_and_address_together(
    relay_addr: str, transport: str | None, effective: Transport, dialled: str
) -> None:
    config = RemoteAccessConfig(relay_addr=relay_addr, transport=transport)
    assert config.effective_transport is effective
    assert str(config.effective_relay_addr) == dialled


def test_a_transport_left_out_follows_another_address() -> None:
    config = attrs.evolve(RemoteAccessConfig(), relay_addr="wss://relay.example")
    assert config.effective_transport is Transport.WEBSOCKET


@pytest.mark.parametrize("transport", ["tcp", "tls"])
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_a_contradiction_is_an_error(transport: str, scheme: str) -> None:
    (problem,) = refused(transport=transport, relay_addr=f"{scheme}://relay.example")
    assert problem.key == "transport"
    assert problem.value == repr(transport)
    assert f"{scheme}:// URL" in problem.message
    with pytest.raises(InvalidSettingsError):
        attrs.evolve(RemoteAccessConfig(transport=transport), relay_addr=f"{scheme}://relay.example")


def test_an_unknown_transport_has_an_error_kind_of_its_own() -> None:
    with pytest.raises(UnsupportedTransportError) as error:
        RemoteAccessConfig(transport="websockets")
    assert error.value.kind is ErrorKind.UNSUPPORTED_TRANSPORT
    assert error.value.final
    assert "'websockets'" in str(error.value)
    assert "nearest of them is 'websocket'" in str(error.value)
    with pytest.raises(UnsupportedTransportError):
        Transport.parse("WebSocket")


def test_an_unknown_transport_does_not_hide_the_rest() -> None:
    with pytest.raises(UnsupportedTransportError) as error:
        RemoteAccessConfig.from_table({"transport": "quic", "max_restarts": -1, "colour": 1})
    assert [problem.kind for problem in error.value.problems] == [
        ErrorKind.UNSUPPORTED_TRANSPORT,
        ErrorKind.INVALID_SETTINGS,
        ErrorKind.INVALID_SETTINGS,
    ]
    assert "colour" in str(error.value)


def test_a_transport_that_is_no_word_is_an_invalid_setting() -> None:
    with pytest.raises(InvalidSettingsError, match="transport = 3"):
        RemoteAccessConfig.from_table({"transport": 3})


@pytest.mark.parametrize("transport", [None, "tcp", "tls", "process"])
def test_a_pin_that_nobody_would_check_is_refused(transport: str | None) -> None:
    (problem,) = refused(relay_identity=PIN, transport=transport)
    assert problem.key == "relay_identity"
    assert str(transport or "tcp") in problem.message
    assert RemoteAccessConfig(relay_identity=PIN, relay_addr="wss://relay.example").relay_identity is not None


# The local server


def test_a_local_server_may_be_a_unix_socket_or_have_tls(tmp_path: Path) -> None:
    config = RemoteAccessConfig(relay_addr="wss://relay.example", local_addr="unix:/run/app.sock")
    assert config.local == config.local_addr == UnixAddress("/run/app.sock")
    config = RemoteAccessConfig(
        relay_addr="wss://relay.example",
        local_addr="https://localhost:8443",
        local_ca_file="ca.pem",
        base_dir=tmp_path,
    )
    assert config.local == HttpsAddress("localhost", 8443, ca_file=tmp_path / "ca.pem")
    config = RemoteAccessConfig(relay_addr="wss://r", local_addr=HttpsAddress("h", verify=False), local_verify=True)
    assert config.local == HttpsAddress("h", verify=False)
    config = RemoteAccessConfig(relay_addr="wss://r", local_addr="https://h", local_verify=False)
    assert config.local == HttpsAddress("h", verify=False)


@pytest.mark.parametrize("local", ["unix:/s", "https://h"])
def test_a_tunnel_program_reaches_host_and_port_alone(local: str) -> None:
    assert [problem.key for problem in refused(transport="process", local_addr=local)] == ["local_addr"]


def test_what_is_about_tls_needs_a_local_server_with_tls() -> None:
    assert [problem.key for problem in refused(local_ca_file="ca.pem")] == ["local_ca_file"]
    assert [problem.key for problem in refused(local_verify=False, local_addr="unix:/s")] == ["local_verify"]


# The proxy


def test_the_proxy_and_the_file_of_its_credentials(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [gateway.remote_access]
        relay_addr = "wss://relay.example"
        proxy = "http://proxy.example:3128"
        proxy_credentials_file = "proxy-credentials"
        """,
    )
    choice = RemoteAccessConfig.load(path).proxy_choice
    assert choice.configured == Proxy("http", "proxy.example", 3128)
    assert choice.credentials_file == tmp_path / "proxy-credentials"
    assert RemoteAccessConfig(proxy="none").proxy_choice.configured == "none"
    assert RemoteAccessConfig().proxy_choice.configured is None


def test_credentials_belong_to_a_proxy() -> None:
    for proxy in (None, "none"):
        (problem,) = refused(proxy=proxy, proxy_credentials_file="file")
        assert problem.key == "proxy_credentials_file"


def test_a_tunnel_program_has_to_be_told_of_the_proxy() -> None:
    relay: dict[str, Any] = {"relay_addr": "relay.example:1", "transport": "process", "proxy": "http://proxy.example"}
    assert RemoteAccessConfig(**relay, process={"command": ["x", "{proxy}"]}).proxy is not None
    template = {"command": ["x", "{config}"], "config_template": "proxy = '{proxy_with_credentials}'"}
    assert RemoteAccessConfig(**relay, process=template).proxy is not None
    (problem,) = refused(**relay, process={"command": ["x"]})
    assert (problem.key, "'{proxy}'" in problem.message) == ("proxy", True)
    for proxy in (None, "none"):
        (problem,) = refused(**relay | {"proxy": proxy}, process={"command": ["x", "{proxy}"]})
        assert (problem.key, "names no proxy" in problem.message) == ("proxy", True)
        assert RemoteAccessConfig(**relay | {"proxy": proxy}, process={"command": ["x"]}).proxy == proxy
    # Other transports ignore the table.
    assert RemoteAccessConfig(relay_addr="relay.example:1", process={"command": ["x", "{proxy}"]}).proxy is None


@pytest.mark.parametrize("change", [{"forwarded_headers": "set"}, {"host_header": "localhost:3000"}])
def test_requests_that_a_tunnel_program_carries_cannot_be_changed(change: dict[str, str]) -> None:
    assert [problem.key for problem in refused(transport="process", **change)] == [*change]


# Several relays

TWO = ["wss://one.example", "wss://other.example"]


def test_several_relays_stand_for_the_one() -> None:
    config = RemoteAccessConfig.from_table({"relay_addrs": TWO})
    assert [*map(str, config.effective_relay_addrs)] == TWO
    assert str(config.relay_addr) == str(config.effective_relay_addr) == TWO[0]
    assert config.effective_transport is Transport.WEBSOCKET
    assert config.effective_links == 2
    assert RemoteAccessConfig(relay_addrs=TWO, links=1).effective_links == 1
    assert RemoteAccessConfig(relay_addrs=[f"wss://{number}.example" for number in "abcdefghij"]).effective_links == 8
    assert attrs.evolve(config, links=3).effective_links == 3


def test_one_relay_has_one_link() -> None:
    config = RemoteAccessConfig(relay_addr="relay.example:1", transport="websocket")
    assert config.effective_links == 1
    assert [*map(str, config.effective_relay_addrs)] == ["wss://relay.example:1"]


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        ({"relay_addrs": "wss://one"}, "relay_addrs", "an array of addresses"),
        ({"relay_addrs": ["wss://one", "http://other"]}, "relay_addrs[1]", "ws and wss"),
        ({"relay_addrs": ["wss://one"] * 17}, "relay_addrs", "16 relays at most"),
        ({"relay_addrs": TWO, "relay_addr": "wss://third.example"}, "relay_addrs", "leave one of them out"),
        ({"relay_addrs": ["wss://one", "other:1"]}, "relay_addrs", "write all in the same way"),
        ({"relay_addrs": ["one:1", "other:1"], "transport": "process"}, "relay_addrs", "one relay"),
        ({"links": 2, "transport": "process"}, "links", "leave it out"),
        ({"links": 9}, "links", "from 1 to 8"),
        ({"links": True}, "links", "from 1 to 8"),
    ],
)
def test_relays_that_do_not_fit_are_named(given: dict[str, Any], key: str, why: str) -> None:
    (problem,) = refused(**given)
    assert problem.key == key
    assert why in problem.message
