"""`[relay]` and the form of `[[relay.tunnels]]`: what is allowed, and errors that name all problems and no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from relay_problems import key, only_problem_of, problems_of, relay, tunnel

from pioneer_tunnel._model.addresses import Address, PublicUrl
from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError, TunnelError
from pioneer_tunnel._model.keys import PublicKey
from pioneer_tunnel.relay import RelayConfig, TunnelEntry


def write(folder: Path, text: str) -> Path:
    path = folder / "relay.toml"
    path.write_text(text)
    return path


FILE = f"""
[relay]
control_addr = "0.0.0.0:8443"
ingress_addr = "[::]:443"
id = "relay-1"
public_names = ["Relay.Example.", "[2001:DB8::0]:8443"]
tls_certificate = "relay.crt"
tls_private_key = "/etc/relay.key"
ingress_tls = false
identity_key_file = "identity"
heartbeat_ms = 20000
announce_certificate = false

[[relay.tunnels]]
id = "office"
url = "https://Office.Example/"
key = "{key(1)}"
service = "pioneer_gateway"

[[relay.tunnels]]
id = "ssh"
url = "https://office.example:8443"
key = "{key(2)}"
bind_addr = "127.0.0.1:0"

[metrics]
unknown = "and none of our business"
"""


def test_a_whole_file(tmp_path: Path) -> None:
    config = RelayConfig.load(write(tmp_path, FILE))
    assert config == RelayConfig(
        control_addr=Address("0.0.0.0", 8443),
        ingress_addr=Address("::", 443),
        id="relay-1",
        public_names=("relay.example", "[2001:db8::]:8443"),
        tls_certificate=Path("relay.crt"),
        tls_private_key=Path("/etc/relay.key"),
        control_tls=True,
        ingress_tls=False,
        identity_key_file=Path("identity"),
        heartbeat_ms=20000,
        announce_certificate=False,
        tunnels=(
            TunnelEntry(
                id="office",
                url=PublicUrl("https", "office.example", 443),
                key=PublicKey.parse(key(1)),
                service="pioneer_gateway",
            ),
            TunnelEntry(
                id="ssh",
                url=PublicUrl("https", "office.example", 8443),
                key=PublicKey.parse(key(2)),
                bind_addr=Address("127.0.0.1", 0),
            ),
        ),
        base_dir=tmp_path,
    )
    assert config.tls_certificate_path == tmp_path / "relay.crt"
    assert config.tls_private_key_path == Path("/etc/relay.key")
    assert config.identity_key_path == tmp_path / "identity"


def test_the_least_that_a_relay_needs() -> None:
    config = RelayConfig.from_table(relay())
    assert (config.control_tls, config.ingress_tls) == (False, False)
    assert config.heartbeat_ms == 15000
    assert config.tunnels == ()
    assert config.tls_certificate_path is config.tls_private_key_path is config.identity_key_path is None


def test_keywords_take_text_and_tables_and_values() -> None:
    by_keywords = RelayConfig(
        control_addr="127.0.0.1:0",
        ingress_addr="127.0.0.1:0",
        id="relay-1",
        public_names=["127.0.0.1:80"],
        tunnels=[TunnelEntry(id="t1", url="https://t1.example", key=key(1)), tunnel(2)],
    )
    by_table = relay(
        tunnel(1),
        tunnel(2),
        control_addr="127.0.0.1:0",
        ingress_addr="127.0.0.1:0",
        public_names=["127.0.0.1:80"],
    )
    assert by_keywords == RelayConfig.from_table(by_table)
    assert attrs.evolve(by_keywords) == by_keywords
    assert hash(by_keywords) == hash(attrs.evolve(by_keywords))


def test_control_and_ingress_may_share_an_address() -> None:
    config = RelayConfig.from_table(relay(control_addr="0.0.0.0:443", ingress_addr="0.0.0.0:443"))
    assert config.control_addr == config.ingress_addr


# TLS


def test_a_certificate_switches_tls_on() -> None:
    config = RelayConfig.from_table(relay(tls_certificate="a", tls_private_key="b"))
    assert (config.control_tls, config.ingress_tls) == (True, True)


@pytest.mark.parametrize("given_alone", ["tls_certificate", "tls_private_key"])
def test_a_certificate_and_its_key_come_together(given_alone: str) -> None:
    missing = ({"tls_certificate", "tls_private_key"} - {given_alone}).pop()
    problem = only_problem_of(relay(**{given_alone: "file"}))
    assert missing in problem.message


@pytest.mark.parametrize("name", ["control_tls", "ingress_tls"])
def test_tls_needs_a_certificate(name: str) -> None:
    problem = only_problem_of(relay(**{name: True}))
    assert (problem.key, problem.value) == (f"relay.{name}", "true")
    assert "tls_certificate" in problem.message


def test_one_address_is_with_or_without_tls() -> None:
    one_address = {"control_addr": "0.0.0.0:443", "ingress_addr": "0.0.0.0:443"}
    certificate = {"tls_certificate": "a", "tls_private_key": "b"}
    problem = only_problem_of(relay(**one_address, **certificate, control_tls=False))
    assert (problem.key, problem.value) == ("relay.ingress_tls", "true")
    assert RelayConfig.from_table(relay(**certificate, control_tls=False)).ingress_tls
    assert not RelayConfig.from_table(
        relay(**one_address, **certificate, control_tls=False, ingress_tls=False)
    ).ingress_tls


def a_blind_tunnel(**changes: Any) -> dict[str, Any]:
    return {"id": "blind", "url": "https://blind.example", "key": key(7), "tls": "passthrough"} | changes


def test_a_relay_whose_tunnels_pass_tls_through_needs_no_certificate() -> None:
    config = RelayConfig.from_table(relay(tunnels=[a_blind_tunnel()]))
    assert config.tls_certificate is None
    assert config.tunnels[0].routes[0].passes_tls


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tls": "pass-through"}, "'terminate' and 'passthrough'"),
        ({"url": "http://blind.example"}, "https://"),
        ({"url": "https://203.0.113.7"}, "needs a name"),
        ({"bind_addr": "127.0.0.1:2222"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_passed_through_is_refused(changes: dict[str, Any], told: str) -> None:
    problem = only_problem_of(relay(tunnels=[a_blind_tunnel(**changes)]))
    assert (problem.key, told in problem.message) == ("relay.tunnels[0].tls", True)


@pytest.mark.parametrize("public_name", ["blind.example", "blind.example:8443"])
def test_at_one_address_for_both_gateways_are_not_passed_through(public_name: str) -> None:
    names = {"public_names": [public_name], "tunnels": [a_blind_tunnel()]}
    assert (
        "public name" in only_problem_of(relay(control_addr="0.0.0.0:443", ingress_addr="0.0.0.0:443", **names)).message
    )
    RelayConfig.from_table(relay(**names))


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("control_addr", "8443", "no port"),
        ("control_addr", 8443, "host:port"),
        ("ingress_addr", "0.0.0.0:65536", "0 to 65535"),
        ("ingress_addr", ":443", "no host"),
        ("ingress_addr", "https://0.0.0.0:443", "the address"),
        ("id", "", "1 to 128"),
        ("id", "a\tb", "printable"),
        ("id", 3, "1 to 128"),
        ("public_names", [], "one name at least"),
        ("public_names", "relay.example", "an array"),
        ("public_names", {"a": 1}, "an array"),
        ("tls_certificate", "", "a path"),
        ("tls_private_key", 3, "a path"),
        ("control_tls", "yes", "true and false"),
        ("announce_certificate", "yes", "true and false"),
        ("identity_key_file", ["a"], "a path"),
        ("heartbeat_ms", 999, "1000 to 60000"),
        ("heartbeat_ms", 60001, "1000 to 60000"),
        ("heartbeat_ms", 15000.0, "whole number"),
        ("rotation_grace_ms", -1, "0 to 86400000"),
        ("rotation_grace_ms", 86_400_001, "0 to 86400000"),
        ("drain_timeout_ms", -1, "0 to 86400000"),
        ("tunnels", {"id": "t1"}, "array of tables"),
        ("tunnels", "t1", "array of tables"),
    ],
)
def test_a_value_is_refused_saying_what_is_allowed(name: str, value: object, why: str) -> None:
    (problem,) = (p for p in problems_of(relay(**{name: value})) if p.key == f"relay.{name}")
    assert why in problem.message
    assert str(problem).startswith(f"relay.toml: relay.{name}")


def test_each_public_name_is_told_by_itself() -> None:
    problems = problems_of(relay(public_names=["relay.example", "wss://relay.example", 3, "a b"]))
    assert [problem.key for problem in problems] == [f"relay.public_names[{index}]" for index in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("id", "", "1 to 128"),
        ("url", "t1.example", "not a URL"),
        ("url", "wss://t1.example", "http and https"),
        ("url", "https://t1.example/path", "has a path"),
        ("url", "https://t1.example?q", "a query"),
        ("url", "https://t1.example#f", "a fragment"),
        ("url", "https://me@t1.example", "user information"),
        ("url", 3, "http:// or https:// URL"),
        ("key", "ed25519:12", "64 hexadecimal digits"),
        ("key", "12", "64 hexadecimal digits"),
        ("key", 12, "64 hexadecimal digits"),
        ("bind_addr", "2222", "no port"),
        ("bind_addr", 2222, "host:port"),
        ("service", "", "1 to 128"),
        ("service", 3, "1 to 128"),
    ],
)
def test_a_tunnel_is_refused_saying_what_is_allowed(name: str, value: object, why: str) -> None:
    problem = only_problem_of(relay(tunnel(1), tunnel(2, **{name: value})))
    assert problem.key == f"relay.tunnels[1].{name}"
    assert why in problem.message
    with pytest.raises(InvalidSettingsError) as error:
        TunnelEntry(**tunnel(2, **{name: value}))
    assert error.value.problems == (attrs.evolve(problem, source=None, key=name),)


@pytest.mark.parametrize("entry", [3, "t1", [], None])
def test_an_entry_that_is_no_table(entry: object) -> None:
    problem = only_problem_of({**relay(), "tunnels": [tunnel(1), entry]})
    assert problem.key == "relay.tunnels[1]"
    assert problem.message == "allowed is a table"


def test_what_is_missing_is_told() -> None:
    assert [(problem.key, problem.message) for problem in problems_of({"tunnels": [{}]})] == [
        ("relay.control_addr", "is missing"),
        ("relay.ingress_addr", "is missing"),
        ("relay.id", "is missing"),
        ("relay.public_names", "is missing"),
        ("relay.tunnels[0].id", "is missing"),
        ("relay.tunnels[0].url", "is missing"),
        ("relay.tunnels[0].key", "is missing"),
    ]


def test_an_unknown_key_is_told_with_the_nearest_known_one() -> None:
    problems = problems_of(relay(tunnel(1, bind_adr="x"), heart_beat=1, base_dir="."))
    assert [(problem.key, problem.nearest) for problem in problems][:2] == [
        ("relay.tunnels[0].bind_adr", "bind_addr"),
        ("relay.heart_beat", "heartbeat_ms"),
    ]
    assert problems[2].key == "relay.base_dir"


def test_a_file_without_the_table(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingsError, match=r"relay: the table is missing; .* 'rely'"):
        RelayConfig.load(write(tmp_path, "[rely]\n"))
    with pytest.raises(InvalidSettingsError, match=r"relay: the table is missing$"):
        RelayConfig.load(write(tmp_path, ""))
    with pytest.raises(InvalidSettingsError, match=r"relay: the table is missing$"):
        RelayConfig.load(write(tmp_path, 'id = "relay-1"\n'))  # a key is no table that could have been meant
    with pytest.raises(InvalidSettingsError, match="line 1, column 2"):
        RelayConfig.load(write(tmp_path, "["))
    with pytest.raises(StorageError, match=r"nowhere\.toml"):
        RelayConfig.load(tmp_path / "nowhere.toml")


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
        [relay]
        control_addr = "nowhere"
        ingress_addr = "0.0.0.0:443"
        public_names = []
        ingress_tls = true
        colour = "red"

        [[relay.tunnels]]
        id = "office"
        url = "ftp://office.example"
        key = "{key(1)}"

        [[relay.tunnels]]
        id = "office"
        url = "https://office.example"
        key = "{key(1)}"
        sevice = "x"
        """,
    )
    with pytest.raises(InvalidSettingsError) as error:
        RelayConfig.load(path)
    assert [problem.key for problem in error.value.problems] == [
        "relay.control_addr",
        "relay.id",
        "relay.public_names",
        "relay.tunnels[0].url",
        "relay.tunnels[1].sevice",
        "relay.tunnels[1].id",
        "relay.tunnels[1].key",
        "relay.ingress_tls",
        "relay.colour",
    ]
    assert {problem.source for problem in error.value.problems} == {str(path)}
    assert error.value.final


# Secrets


@pytest.mark.parametrize(
    "secret",
    ["ptk1_test-key-0123456789abcdefghijkl", "1a4e0316eaf6595ed9acc16a95cac8ee5d4a8bb67a7901a2693127b9a4c2e4a4"],
)
def test_a_secret_in_a_wrong_place_never_shows(secret: str) -> None:
    places: list[dict[str, Any]] = [
        relay(tunnel(1, key=secret)),
        relay(tunnel(1, key=f"ed25519:{secret[:-1]}")),
        relay(tunnel(1, key=[secret])),
        relay(tunnel(1, kye=secret)),
        relay(tunnel(1, url=secret)),
        relay(tunnel(1, url=f"https://x:{secret}@t1.example")),
        relay(tunnel(1, bind_addr=secret)),
        relay(tunnel(1, **{secret: 1})),
        relay(tunnel(1, id=f"{secret}\n")),
        relay(tunnel(1, service=f"{secret}\n")),
        relay(tunnel(1, id=f"{secret}" * 9), tunnel(2, id=f"{secret}" * 9)),
        relay(id=f" {secret}"),
        relay(public_names=[f" {secret}"]),
        relay(public_names=[{secret: secret}]),
        relay(control_addr=secret),
        relay(identity_key_file=[secret]),
        relay(identity_key=secret),
        relay(heartbeat_ms=secret),
        relay(tls_private_key=f"{secret}"),
        {**relay(), "tunnels": [secret]},
    ]
    for table in places:
        for problem in problems_of(table):
            assert secret not in str(problem)
            assert secret[:-1] not in repr(problem)


def test_a_public_key_is_refused_without_quoting_it() -> None:
    problem = only_problem_of(relay(tunnel(1, key="hunter2")))
    assert problem.value is None
    assert "hunter2" not in repr(problem)


# Junk


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.sampled_from(["0.0.0.0:1", "https://a.example", key(1), "relay.example"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
names = st.sampled_from([field.name for field in attrs.fields(RelayConfig)]) | st.text(max_size=9)
entry_names = st.sampled_from([field.name for field in attrs.fields(TunnelEntry)]) | st.text(max_size=9)
entries = st.builds(lambda other: tunnel(1, **other), st.dictionaries(entry_names, values, max_size=3)) | values
junk_tables = st.builds(
    lambda tunnels, other: {**relay(), "tunnels": tunnels, **other},
    st.lists(entries, max_size=3),
    st.dictionaries(names, values, max_size=4),
)


@settings(deadline=None)
@given(table=junk_tables | values)
def test_junk_gives_a_config_or_an_error_of_ours(table: Any) -> None:
    try:
        config = RelayConfig.from_table(table)
    except TunnelError as error:
        problems, text = error.problems, str(error)
    else:
        assert attrs.evolve(config) == config
        return
    assert problems
    text.encode()  # lone surrogates are escaped, so it can be printed
    for problem in problems:
        assert problem.key.startswith("relay")
        assert str(problem) in text
