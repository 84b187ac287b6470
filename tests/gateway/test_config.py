"""`[gateway.remote_access]`: its defaults, what it takes, and what it refuses, all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from configs import KEYS, PIN, complaint_of, refused, write
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError, UnsupportedTransportError
from pioneer_tunnel._model.keys import PublicKey
from pioneer_tunnel._model.text import clean_message
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.gateway.transport import Transport
from pioneer_tunnel.transports.rathole.key_mode import KeyMode

HUGE = 10**5000  # Python refuses to write it out

CONTRACT_DEFAULTS = {
    "runtime_dir": Path("remote-access"),
    "relay_addr": RelayAddress(None, "relay-eu-west-1.getpioneer.dev", 2333),
    "local_addr": Address("127.0.0.1", 17878),
    "service_name": "pioneer_gateway",
    "transport": None,
    "restart_initial_ms": 1000,
    "restart_max_ms": 30000,
    "restart_jitter_percent": 20,
    "max_restarts": 0,
    "restart_stable_ms": 30000,
    "allow_server_override": False,
    "apply_grace_ms": 1000,
    "stop_grace_ms": 5000,
    "ca_file": None,
    "relay_identity": None,
    "proxy_protocol": None,
    "forwarded_headers": None,
    "host_header": None,
    "raw_services": (),
    "access_log": None,
    "access_log_format": "common",
    "access_log_addresses": "full",
    "access": None,
    "service_access": {},
    "key_mode": "token_routing",
    "connect_timeout_ms": 10000,
    "heartbeat_ms": None,
    "resume_timeout_ms": 60000,
    "process": None,
    "tls": None,
    "acme": None,
    "system_trust": "openssl",
    "local_ca_file": None,
    "local_verify": True,
    "services": {},
    "proxy": None,
    "proxy_credentials_file": None,
    "relay_addrs": (),
    "links": None,
    "metrics": None,
    "request_id": None,
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=5)
    | st.dates()
    | st.sampled_from(["wss://relay.example", "relay:1", "tcp", "tls", "noise", "v2", PIN, "remote-access"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
junk_tables = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), values, max_size=8)


def test_the_defaults_are_those_of_the_contract() -> None:
    config = RemoteAccessConfig()
    assert {key: getattr(config, key) for key in KEYS} == CONTRACT_DEFAULTS
    assert config.effective_transport is Transport.TCP


def test_a_table_of_text_gives_values(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
        [gateway]
        name = "of no concern"

        [gateway.remote_access]
        runtime_dir = "run"
        relay_addr = "wss://Relay.Example/tunnel"
        local_addr = "[::1]:80"
        service_name = "büro 7"
        transport = "websocket"
        restart_initial_ms = 1
        restart_max_ms = 1
        restart_jitter_percent = 0
        max_restarts = 3
        restart_stable_ms = 5
        allow_server_override = true
        apply_grace_ms = 0
        ca_file = "ca.pem"
        relay_identity = "{PIN}"
        proxy_protocol = "v2"
        forwarded_headers = "set"
        host_header = "Localhost:3000"
        connect_timeout_ms = 250
        heartbeat_ms = 10000
        resume_timeout_ms = 0

        [other]
        unknown_key = 1
        """,
    )
    assert RemoteAccessConfig.load(path) == RemoteAccessConfig(
        runtime_dir=Path("run"),
        relay_addr=RelayAddress("wss", "relay.example", 443, "/tunnel"),
        local_addr=Address("::1", 80),
        service_name="büro 7",
        transport=Transport.WEBSOCKET,
        restart_initial_ms=1,
        restart_max_ms=1,
        restart_jitter_percent=0,
        max_restarts=3,
        restart_stable_ms=5,
        allow_server_override=True,
        apply_grace_ms=0,
        ca_file=Path("ca.pem"),
        relay_identity=PublicKey.parse(PIN),
        proxy_protocol="v2",
        forwarded_headers="set",
        host_header="localhost:3000",
        connect_timeout_ms=250,
        heartbeat_ms=10_000,
        resume_timeout_ms=0,
        base_dir=tmp_path,
    )


def test_keywords_take_text_too() -> None:
    config = RemoteAccessConfig(relay_addr="wss://relay.example", local_addr="127.0.0.1:1", ca_file="ca.pem")
    assert config.relay_addr == RelayAddress("wss", "relay.example", 443)
    assert config.local_addr == Address("127.0.0.1", 1)
    assert config.ca_path == Path("ca.pem")


@pytest.mark.parametrize("text", ["", "[gateway]\n", "[gateway.remote_access]\n", "\ufeff[gateway]\r\n"])
def test_a_missing_table_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert RemoteAccessConfig.load(write(tmp_path, text)) == RemoteAccessConfig(base_dir=tmp_path)


def test_relative_paths_are_below_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, '[gateway.remote_access]\nca_file = "ca.pem"\n')
    monkeypatch.chdir(tmp_path)
    config = RemoteAccessConfig.load("gateway.toml")
    monkeypatch.chdir("/")
    assert config.runtime_path == tmp_path / "remote-access"
    assert config.ca_path == tmp_path / "ca.pem"
    assert attrs.evolve(config, runtime_dir="/var/lib/tunnel").runtime_path == Path("/var/lib/tunnel")


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("runtime_dir", "", "a path"),
        ("runtime_dir", "a\0b", "a path"),
        ("runtime_dir", 3, "a path"),
        ("ca_file", ["ca.pem"], "a path"),
        ("relay_addr", "relay", "host:port"),
        ("relay_addr", 2333, "host:port or a ws:// or wss:// URL"),
        ("relay_addr", "https://relay", "ws and wss"),
        ("local_addr", "127.0.0.1:0", "1 to 65535"),
        ("local_addr", None, "host:port"),
        ("service_name", "", "1 to 128"),
        ("service_name", "x" * 129, "1 to 128"),
        ("service_name", " x", "outer white space"),
        ("service_name", "a\nb", "printable"),
        ("service_name", "a\u202eb", "printable"),
        ("service_name", "a\u2028b", "printable"),
        ("service_name", 7, "1 to 128"),
        ("restart_initial_ms", 0, "1 to 3600000"),
        ("restart_initial_ms", 1.0, "whole number"),
        ("restart_initial_ms", True, "whole number"),
        ("restart_initial_ms", "1000", "whole number"),
        pytest.param("restart_max_ms", HUGE, "1 to 86400000", id="huge"),
        ("restart_jitter_percent", 101, "0 to 100"),
        ("restart_jitter_percent", -1, "0 to 100"),
        ("max_restarts", -1, "at least 0"),
        ("restart_stable_ms", 0, "1 to 86400000"),
        ("allow_server_override", 1, "true and false"),
        ("allow_server_override", "yes", "true and false"),
        ("apply_grace_ms", -1, "0 to 600000"),
        ("stop_grace_ms", -1, "0 to 600000"),
        ("connect_timeout_ms", 0, "1 to 600000"),
        ("heartbeat_ms", 999, "1000 to 60000"),
        ("heartbeat_ms", 60_001, "1000 to 60000"),
        ("resume_timeout_ms", 3_600_001, "0 to 3600000"),
        ("relay_identity", "ed25519:12", "64 hexadecimal digits"),
        ("relay_identity", 12, "64 hexadecimal digits"),
        ("key_mode", "token-hash", "nearest of them is 'token_hash'"),
        ("key_mode", 1, "token_routing, token_hash, rathole"),
        ("proxy", "proxy", "has no port"),
        ("proxy", "socks4://proxy", "http and https and socks5"),
        ("proxy", "http://user:word@proxy", "proxy_credentials_file"),
        ("proxy", 3128, "'none'"),
        ("proxy_credentials_file", "", "a path"),
        ("proxy_protocol", "v1", "'v2'"),
        ("proxy_protocol", True, "'v2'"),
        ("forwarded_headers", "append", "'set'"),
        ("forwarded_headers", True, "'set'"),
        ("forwarded_headers", ["set"], "'set'"),
        ("request_id", ["set"], "'set' and 'keep'"),
        ("access_log_addresses", ["full"], "'full' and 'short'"),
        ("host_header", "http://localhost", "host"),
        ("host_header", 3000, "host or host:port"),
        ("raw_services", "ssh", "array of names"),
        ("raw_services", ["a b"], "lower-case letters"),
        ("raw_services", [1], "lower-case letters"),
    ],
)
def test_a_value_is_refused_saying_what_is_allowed(key: str, value: object, allowed: str) -> None:
    (by_keyword,) = refused(**{key: value})
    assert by_keyword.key == key
    assert allowed in by_keyword.message
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.from_table({key: value}, source="gateway.toml")
    (in_file,) = error.value.problems
    assert in_file == attrs.evolve(by_keyword, source="gateway.toml", key=f"gateway.remote_access.{key}")
    assert str(error.value) == str(in_file)
    assert str(in_file).startswith(f"gateway.toml: gateway.remote_access.{key}")


def test_the_longest_delay_is_not_under_the_first() -> None:
    (problem,) = refused(restart_initial_ms=100, restart_max_ms=99)
    assert (problem.key, problem.value) == ("restart_max_ms", "99")
    assert "restart_initial_ms, which is 100" in problem.message


def test_a_heartbeat_is_for_relays_that_can_be_asked_for_one() -> None:
    assert RemoteAccessConfig(relay_addr="wss://relay.example", heartbeat_ms=5000).heartbeat_ms == 5000
    (problem,) = refused(relay_addr="relay.example:1", heartbeat_ms=5000)
    assert problem.key == "heartbeat_ms"
    assert "this is tcp" in problem.message


def test_a_key_mode_is_for_relays_that_have_one() -> None:
    for transport in ("tcp", "tls"):
        config = RemoteAccessConfig(transport=transport, key_mode="rathole")
        assert config.key_mode is KeyMode.RATHOLE
    assert RemoteAccessConfig(key_mode="token_hash").effective_transport is Transport.TCP
    (problem,) = refused(relay_addr="wss://relay.example", key_mode="rathole")
    assert problem.key == "key_mode"
    assert "this is websocket" in problem.message


def test_an_unknown_key_is_told_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.from_table({"relay_adr": "relay:1", "restart-max-ms": 1, "sp ace": 1, "base_dir": "."})
    assert [(problem.key, problem.nearest) for problem in error.value.problems][:2] == [
        ("gateway.remote_access.relay_adr", "relay_addr"),
        ("gateway.remote_access.restart-max-ms", "restart_max_ms"),
    ]
    assert "gateway.remote_access.'sp ace': unknown key" in str(error.value)
    assert "gateway.remote_access.base_dir: unknown key" in str(error.value)


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [gateway.remote_access]
        relay_addr = "http://relay"
        local_addr = "nowhere"
        restart_initial_ms = 20
        restart_max_ms = 10
        max_restarts = -1
        colour = "red"
        """,
    )
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.load(path)
    table = "gateway.remote_access"
    assert [problem.key for problem in error.value.problems] == [
        f"{table}.relay_addr",
        f"{table}.local_addr",
        f"{table}.max_restarts",
        f"{table}.restart_max_ms",
        f"{table}.colour",
    ]
    assert {problem.source for problem in error.value.problems} == {str(path)}
    first, *lines = str(error.value).splitlines()
    assert first == "5 problems:"
    assert lines == [str(problem) for problem in error.value.problems]
    assert error.value.final
    assert "http://relay" in clean_message(str(error.value))


def test_every_problem_of_keywords_is_told_at_once() -> None:
    assert [problem.key for problem in refused(relay_addr="x", local_addr="y", max_restarts=-1)] == [
        "relay_addr",
        "local_addr",
        "max_restarts",
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gateway = 3", "gateway"),
        ("[[gateway]]", "gateway"),
        ("[gateway]\nremote_access = true", "gateway.remote_access"),
        ("[[gateway.remote_access]]", "gateway.remote_access"),
    ],
)
def test_something_else_in_the_place_of_the_table(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(InvalidSettingsError) as error:
        RemoteAccessConfig.load(write(tmp_path, text))
    assert [problem.key for problem in error.value.problems] == [key]
    assert "allowed is a table" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.toml cannot be read: No such file"):
        RemoteAccessConfig.load(tmp_path / "nowhere.toml")
    path = write(tmp_path, "[gateway]\nremote_access = oops")
    with pytest.raises(InvalidSettingsError, match=r"gateway\.toml: line 2, column 17: not TOML"):
        RemoteAccessConfig.load(path)


# Junk


@settings(deadline=None)
@given(table=junk_tables)
def test_a_junk_table_gives_a_config_or_an_error_of_ours(table: dict[str, Any]) -> None:
    error = complaint_of(RemoteAccessConfig.from_table, table)
    if error is None:
        assert RemoteAccessConfig(**table) == RemoteAccessConfig.from_table(table)
        return
    assert isinstance(error, InvalidSettingsError | UnsupportedTransportError)
    assert error.problems
    text = str(error)
    text.encode()  # lone surrogates are escaped, so it can be printed
    assert len(text) < 1000 * (1 + len(error.problems))
    for problem in error.problems:
        assert str(problem) in text


@settings(deadline=None)
@given(
    table=st.fixed_dictionaries(
        {},
        optional={
            "relay_addr": st.sampled_from(["relay.example:1", "ws://relay.example", "wss://[::1]:8443/path"]),
            "local_addr": st.sampled_from(["127.0.0.1:80", "localhost:8080", "[::1]:1"]),
            "service_name": st.text(alphabet="abcé_-. ", min_size=1).map(lambda text: f"x{text}x"),
            "transport": st.sampled_from(["websocket", "noise", "process"]),
            "restart_initial_ms": st.integers(1, 30_000),
            "restart_max_ms": st.integers(30_000, 86_400_000),
            "restart_jitter_percent": st.integers(0, 100),
            "max_restarts": st.integers(min_value=0),
            "allow_server_override": st.booleans(),
            "proxy_protocol": st.just("v2"),
        },
    )
)
def test_a_good_table_says_the_same_by_every_way(table: dict[str, Any]) -> None:
    config = RemoteAccessConfig.from_table(table)
    assert RemoteAccessConfig(**table) == config
    assert attrs.evolve(config) == config
    assert RemoteAccessConfig.from_table({key: getattr(config, key) for key in KEYS}) == config
    written = {key: str(value) if isinstance(value, Address | RelayAddress) else value for key, value in table.items()}
    assert RemoteAccessConfig.from_table(written) == config
    assert hash(config) == hash(attrs.evolve(config))
