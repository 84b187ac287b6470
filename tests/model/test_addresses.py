"""Addresses are read strictly, have one normal form, and never show what stood before an '@'."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from pioneer_tunnel._model.addresses import (
    Address,
    HttpsAddress,
    LocalAddress,
    PublicUrl,
    RelayAddress,
    UnixAddress,
    bracketed,
    is_ip_address,
    is_loopback,
    local_address,
    normal_audience,
    normal_host,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "native-auth.json").read_text())

labels = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=4).map(".".join).map(lambda name: name + ".example")
ips = st.ip_addresses().map(lambda ip: bracketed(str(ip).partition("%")[0]))
hosts = names | ips
ports = st.integers(1, 65535)
paths = st.just("") | st.from_regex(r"/[A-Za-z0-9._~@:-]{0,20}", fullmatch=True)
# Text that gets far into the parser, and text that gets nowhere.
parsers = (Address.parse, RelayAddress.parse, PublicUrl.parse, normal_audience)
junk = st.text(alphabet="ab01.:[]@/?#%-_ \t\n\0éİß。²\u00ad\u200d\ud800", max_size=40) | st.text(max_size=40)


def complaint_of(parse: Callable[[str], object], text: str) -> str:
    """What the `ValueError` says; empty when `text` is accepted."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:17878", "127.0.0.1", 17878),
        ("localhost:1", "localhost", 1),
        ("Relay.Example.COM.:2333", "relay.example.com", 2333),
        ("[::1]:65535", "::1", 65535),
        ("[2001:DB8:0:0::1]:80", "2001:db8::1", 80),
        ("bücher.example:80", "xn--bcher-kva.example", 80),
        ("bücher。example。:80", "xn--bcher-kva.example", 80),
        ("under_score:80", "under_score", 80),
    ],
)
def test_an_address_is_read_into_its_normal_form(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert RelayAddress.parse(text) == RelayAddress(None, host, port)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no port"),
        ("relay", "no port"),
        ("[::1]", "no port"),
        (":80", "no host"),
        (".:80", "no host"),
        ("relay:0", "from 1 to 65535"),
        ("relay:65536", "from 1 to 65535"),
        ("relay:", "from 1 to 65535"),
        ("relay:+80", "from 1 to 65535"),
        ("relay:\u0668\u0660", "from 1 to 65535"),
        ("relay:80\n", "from 1 to 65535"),
        ("::1", "in brackets"),
        ("::1:80", "in brackets"),
        ("[::1:80", "without ']'"),
        ("[::1]80", "after the IPv6 address"),
        ("[relay]:80", "not an IPv6 address"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[fe80::1%eth0]:80", "zone"),
        ("256.0.0.1:80", "not an IPv4 address"),
        ("127.1:80", "not an IPv4 address"),
        ("0x7f.1:80", "not an IPv4 address"),
        ("0x7f000001:80", "not an IPv4 address"),
        ("relay.0x:80", "not an IPv4 address"),
        ("010.0.0.1:80", "not an IPv4 address"),
        ("re lay:80", "neither a host name nor an IP address"),
        ("-relay:80", "neither a host name nor an IP address"),
        ("relay-:80", "neither a host name nor an IP address"),
        ("re..lay:80", "neither a host name nor an IP address"),
        ("relay..:80", "neither a host name nor an IP address"),
        ("a" * 64 + ":80", "neither a host name nor an IP address"),
        ("a." * 127 + "a:80", "neither a host name nor an IP address"),
        ("é" * 254 + ":80", "neither a host name nor an IP address"),
        ("\u0661.example:80", "internationalised"),
        ("\ud800:80", "internationalised"),
        ("user:hunter2@relay:80", "user information"),
        ("hunter2@relay:80", "user information"),
    ],
)
def test_anything_else_is_refused_and_the_error_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="the address ") as refused:
        Address.parse(text)
    assert why in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_port_0_is_an_address_to_listen_at_only() -> None:
    assert Address.parse("0.0.0.0:0", listening=True) == Address("0.0.0.0", 0)
    assert Address.parse("[::]:0", listening=True) == Address("::", 0)
    with pytest.raises(ValueError, match="from 1 to 65535"):
        Address.parse("0.0.0.0:0")
    with pytest.raises(ValueError, match="from 0 to 65535"):
        Address.parse("0.0.0.0:65536", listening=True)


def test_an_address_knows_whether_it_has_to_be_resolved() -> None:
    assert Address("127.0.0.1", 1).is_ip
    assert Address("::1", 1).is_ip
    assert not Address("localhost", 1).is_ip


def test_what_only_this_host_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "relay.localhost")))
    assert not any(map(is_loopback, ("relay.test", "localhost.test", "192.168.1.1", "0.0.0.0", "::", "2001:db8::1")))


@pytest.mark.parametrize(
    ("text", "parsed", "audience"),
    [
        ("ws://relay.example", RelayAddress("ws", "relay.example", 80, "/"), "relay.example"),
        ("wss://relay.example", RelayAddress("wss", "relay.example", 443, "/"), "relay.example"),
        ("WSS://Relay.Example.:443/", RelayAddress("wss", "relay.example", 443, "/"), "relay.example"),
        ("ws://relay.example:443", RelayAddress("ws", "relay.example", 443, "/"), "relay.example:443"),
        ("wss://relay.example:80/a/b%20c", RelayAddress("wss", "relay.example", 80, "/a/b%20c"), "relay.example:80"),
        ("wss://relay.example/@x", RelayAddress("wss", "relay.example", 443, "/@x"), "relay.example"),
        ("wss://[2001:DB8::0]", RelayAddress("wss", "2001:db8::", 443, "/"), "[2001:db8::]"),
        ("wss://bücher.example", RelayAddress("wss", "xn--bcher-kva.example", 443, "/"), "xn--bcher-kva.example"),
        ("relay.example:443", RelayAddress(None, "relay.example", 443, "/"), "relay.example:443"),
        ("[::1]:2333", RelayAddress(None, "::1", 2333, "/"), "[::1]:2333"),
    ],
)
def test_a_relay_address_has_an_audience(text: str, parsed: RelayAddress, audience: str) -> None:
    assert RelayAddress.parse(text) == parsed
    assert parsed.audience == audience
    assert normal_audience(audience) == audience


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_audience_is_that_of_the_vectors(vector: dict[str, str]) -> None:
    assert RelayAddress.parse(vector["url"]).audience == vector["audience"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        (" wss://relay", "white space"),
        ("wss://relay\n", "white space"),
        ("wss://re\x85lay", "white space"),
        ("wss://re\x00lay", "control character"),
        ("http://relay", "another scheme than ws and wss"),
        ("://relay", "another scheme"),
        ("relay:80/path", "path, query or fragment"),
        ("relay:80?q", "path, query or fragment"),
        ("relay:80#f", "path, query or fragment"),
        ("wss:/relay", "path, query or fragment"),
        ("wss://", "no host"),
        ("wss:///path", "no host"),
        ("wss://relay?q=1", "a query"),
        ("wss://relay/#f", "a fragment"),
        ("wss://relay/a\\b", "characters that a URL path does not have"),
        ("wss://relay/é", "percent-encode"),
        ("wss://relay/%zz", "percent-encode"),
        ("wss://relay/%2", "percent-encode"),
        ("wss://relay:0", "from 1 to 65535"),
        ("wss://relay:", "from 1 to 65535"),
        ("wss://::1", "in brackets"),
        ("wss://127.1", "not an IPv4 address"),
    ],
)
def test_a_relay_address_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="the address ") as refused:
        RelayAddress.parse(text)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "wss://user:hunter2@relay/",
        "wss://hunter2@relay",
        "WSS://user:hunter2@relay",
        "wss://user:hun/hunter2@relay:1",
        "wss://user:hunter2/@relay",
        "wss://user:hunter2?@relay",
        "wss://user:hunter2#@relay",
        "wss://user:hunter2@@relay",
        "wss://user:\nhunter2@relay",
        "wss://[hunter2@relay]",
        "ftp://user:hunter2@relay",
        "hunter2://user@relay",
        "user:hunter2@relay:80",
        "user:hunter2/@relay:80",
        "hunter2@relay",
        "ws:user:hunter2@relay",
    ],
)
def test_what_stands_before_an_at_sign_is_never_shown(text: str) -> None:
    for parse in parsers:
        with pytest.raises(ValueError, match="the address ") as refused:
            parse(text)
        assert "hunter2" not in str(refused.value)
        assert "hunter2" not in str(refused.value.__cause__)
        assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    "text",
    [
        "wss://relay?token=hunter2",
        "wss://relay/#hunter2",
        "relay:80?hunter2",
        "https://office?a=1#hunter2",
        "?\nhunter2",
    ],
)
def test_a_query_is_never_shown(text: str) -> None:
    for parse in parsers:
        with pytest.raises(ValueError, match="the address ") as refused:
            parse(text)
        assert "hunter2" not in str(refused.value)


def test_a_bare_address_can_be_given_a_scheme() -> None:
    address = RelayAddress.parse("relay.example:443").with_scheme("wss")
    assert address == RelayAddress.parse("wss://relay.example")
    assert address.secure
    assert not address.with_scheme("ws").secure


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("http://Office.Example", "http://office.example"),
        ("https://office.example:443/", "https://office.example"),
        ("https://office.example:80", "https://office.example:80"),
        ("HTTP://[::0001]:8080/", "http://[::1]:8080"),
    ],
)
def test_a_public_url_is_a_whole_site(text: str, normal: str) -> None:
    assert str(PublicUrl.parse(text)) == normal
    assert PublicUrl.parse(normal) == PublicUrl.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("office.example", "not a URL"),
        ("wss://office.example", "another scheme than http and https"),
        ("https://office.example/path", "has a path"),
        ("https://office.example//", "has a path"),
        ("https://office.example?q", "a query"),
        ("https://office.example#f", "a fragment"),
        ("https://office .example", "white space"),
        ("https://office.example:0", "from 1 to 65535"),
        ("https://", "no host"),
    ],
)
def test_a_public_url_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="the address ") as refused:
        PublicUrl.parse(text)
    assert why in str(refused.value)


@settings(deadline=None)
@given(host=hosts, port=ports)
def test_an_address_survives_being_written_and_read(host: str, port: int) -> None:
    address = Address.parse(f"{host}:{port}")
    assert Address.parse(str(address)) == address
    assert address.is_ip == host.startswith("[") or is_ip_address(host)


@settings(deadline=None)
@given(scheme=st.sampled_from(["", "ws://", "wss://"]), host=hosts, port=ports, path=paths)
def test_a_relay_address_survives_being_written_and_read(scheme: str, host: str, port: int, path: str) -> None:
    address = RelayAddress.parse(f"{scheme}{host}:{port}{path if scheme else ''}")
    assert RelayAddress.parse(str(address)) == address
    assert normal_audience(address.audience) == address.audience


@settings(deadline=None)
@given(scheme=st.sampled_from(["http", "https"]), host=hosts, port=ports)
def test_a_public_url_survives_being_written_and_read(scheme: str, host: str, port: int) -> None:
    url = PublicUrl.parse(f"{scheme}://{host}:{port}")
    assert PublicUrl.parse(str(url)) == url


@settings(deadline=None)
@given(host=names, port=ports)
def test_case_and_a_last_dot_make_no_difference(host: str, port: int) -> None:
    assert Address.parse(f"{host.upper()}.:{port}") == Address.parse(f"{host}:{port}")


@settings(deadline=None)
@given(text=junk)
@example("é" * 5000 + ":80")
@example("@" * 5000)
def test_no_text_does_anything_but_parse_or_raise_value_error(text: str) -> None:
    for parse in parsers:
        complaint = complaint_of(parse, text)
        complaint.encode()  # a lone surrogate is escaped, so the message can be printed


@settings(deadline=None)
@given(text=junk)
def test_a_normal_host_is_its_own_normal_form(text: str) -> None:
    try:
        normal = normal_host(text, text)
    except ValueError:
        return
    assert normal.isascii()
    assert normal == normal.lower()
    assert normal_host(bracketed(normal), normal) == normal
    if ":" in normal:
        assert ipaddress.IPv6Address(normal).compressed == normal


@settings(deadline=None)
@given(before=st.text(), secret=st.text(alphabet="ABCDEFGH", min_size=4), after=st.text(alphabet="abc.:/?#[]"))
def test_no_text_before_an_at_sign_is_shown(before: str, secret: str, after: str) -> None:
    for parse in parsers:
        assert secret not in complaint_of(parse, f"{before}{secret}@{after}")


@pytest.mark.parametrize(
    ("host", "port", "wrong"),
    [
        ("", 80, "'' is no host"),
        ("[::1]", 80, "is no host"),
        ("relay.test/path", 80, "is no host"),
        ("user@relay.test", 80, "is no host"),
        ("relay test", 80, "is no host"),
        (None, 80, "None is no host"),
        ("relay.test", -1, "-1 is no port"),
        ("relay.test", 65536, "65536 is no port"),
        ("relay.test", "80", "'80' is no port"),
        ("relay.test", True, "True is no port"),
    ],
)
def test_an_address_made_of_what_is_none_is_refused(host: Any, port: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)):
        Address(host, port)
    with pytest.raises(ValueError, match=re.escape(wrong)):
        RelayAddress("wss", host, port)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("unix:/run/app.sock", UnixAddress("/run/app.sock")),
        ("unix:/with a space", UnixAddress("/with a space")),
        ("https://localhost", HttpsAddress("localhost", 443)),
        ("https://LOCALHOST:8443/", HttpsAddress("localhost", 8443)),
        ("https://[::1]:8443", HttpsAddress("::1", 8443)),
    ],
)
def test_a_local_server_is_read_and_written(text: str, address: LocalAddress) -> None:
    assert local_address(text) == address
    assert local_address(str(address)) == address
    assert local_address(address) is address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("unix:app.sock", "absolute path"),
        ("unix:", "absolute path"),
        ("unix:/" + 107 * "x", "at most 107 bytes"),
        ("unix:/a\0b", "absolute path"),
        ("/run/app.sock", "no port"),
        ("http://localhost:80", "host:port"),
        ("https://localhost/path", "path"),
        ("https://user:secret@localhost", "user information"),
        ("ftp://localhost", "another scheme"),
        ("nonsense", "no port"),
    ],
)
def test_what_is_no_local_server_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        local_address(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("cls", [UnixAddress, HttpsAddress])
def test_each_kind_of_local_server_reads_only_its_own(cls: type[UnixAddress | HttpsAddress]) -> None:
    for text in {"127.0.0.1:80", "unix:/s", "https://h", "http://h"} - {
        "unix:/s" if cls is UnixAddress else "https://h"
    }:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            cls.parse(text)
