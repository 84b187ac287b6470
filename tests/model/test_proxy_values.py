"""A proxy as a value: what is read, and that credentials are not to be seen."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel import Proxy, ProxyCredentials
from pioneer_tunnel._model.proxies import configured_proxy

SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("http://proxy.example", "http://proxy.example:80"),
        ("HTTP://Proxy.Example:3128/", "http://proxy.example:3128"),
        ("proxy.example:3128", "http://proxy.example:3128"),
        ("https://proxy.example", "https://proxy.example:443"),
        ("socks5://10.0.0.1", "socks5://10.0.0.1:1080"),
        ("socks://10.0.0.1:1080/", "socks5://10.0.0.1:1080"),
        ("socks5h://[2001:db8::1]:9050", "socks5://[2001:db8::1]:9050"),
        ("http://bücher.example", "http://xn--bcher-kva.example:80"),
    ],
)
def test_urls(text: str, normal: str) -> None:
    proxy = Proxy.parse(text)
    assert str(proxy) == normal
    assert Proxy.parse(normal) == proxy
    assert proxy.credentials is None


def test_credentials_are_percent_encoded() -> None:
    proxy = Proxy.parse("http://us%40er:p%3Ass%2Fw%C3%B6rd@proxy:3128")
    assert proxy.credentials is not None
    assert proxy.credentials.reveal() == ("us@er", "p:ss/wörd")
    assert Proxy.parse("user:word@proxy:3128").credentials == ProxyCredentials("user", "word")
    assert Proxy.parse("socks5://user@proxy").credentials == ProxyCredentials("user", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("socks4://proxy", "has another scheme than http and https and socks5 and socks5h and socks"),
        ("ftp://user:hunter2-and-more@proxy", "has another scheme"),
        ("http://proxy/path", "has a path"),
        ("http://proxy?hunter2-and-more", "has a query"),
        ("http://proxy:0", "has a port that is not a number"),
        ("http://", "has no host"),
        ("proxy", "has no port"),
        ("None", "has no port"),
        ("http://user:hunter2-and-more@proxy:port", "has a port"),
        ("user:hunter2-and-more@proxy:port", "has a port"),
        ("http://user:hunter2-and/more@proxy", "percent-encoded"),
        ("http://user:hunter2-and more@proxy", "percent-encoded"),
        ("http://:hunter2-and-more@proxy", "a user name that is empty"),
        ("http://us%3Aer:hunter2-and-more@proxy", "has a colon"),
        ("http://user:hunter2-and-more%00@proxy", "a control character"),
        ("http://user:hunter2-and-more%ff@proxy", "not UTF-8"),
        (f"http://user:hunter2-and-more{'x' * 250}@proxy", "more than 255 bytes"),
    ],
)
def test_what_is_refused_is_quoted_without_credentials(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        Proxy.parse(text)
    assert SECRET not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_credentials_have_no_printable_form() -> None:
    proxy = Proxy.parse(f"http://user:{SECRET}@proxy")
    assert proxy.credentials is not None
    for shown in (repr(proxy), str(proxy), f"{proxy.credentials}", repr(proxy.credentials), f"{proxy!r:>200}"):
        assert SECRET not in shown
        assert "user" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(proxy)
    assert proxy == Proxy.parse(f"http://user:{SECRET}@proxy") != Proxy.parse("http://user:other@proxy")
    assert len({proxy.credentials, ProxyCredentials("user", SECRET)}) == 1
    assert copy.deepcopy(proxy) == copy.copy(proxy) == proxy


PARTS = st.text(st.characters(exclude_categories=["C"]), max_size=60).filter(lambda part: ":" not in part)


@given(user=PARTS.filter(bool), password=PARTS)
def test_credentials_go_through_a_url(user: str, password: str) -> None:
    proxy = Proxy("http", "proxy.example", 3128, ProxyCredentials(user, password))
    assert Proxy.parse(proxy.url_with_credentials) == proxy


@given(st.text(max_size=80))
def test_any_text_is_a_proxy_or_a_value_error(text: str) -> None:
    try:
        proxy = Proxy.parse(text)
    except ValueError:
        return
    assert Proxy.parse(str(proxy)).host == proxy.host


def test_a_file_has_colons_in_its_password() -> None:
    assert ProxyCredentials.parse("user:pass:word").reveal() == ("user", "pass:word")
    with pytest.raises(ValueError, match="not written as user:password"):
        ProxyCredentials.parse(SECRET)


def test_a_configuration_holds_no_credentials() -> None:
    assert configured_proxy("none") == "none"
    assert configured_proxy("http://proxy") == Proxy("http", "proxy", 80)
    with_credentials = Proxy("http", "proxy", 80, ProxyCredentials("user", SECRET))
    assert configured_proxy(with_credentials) is with_credentials
    with pytest.raises(ValueError, match="proxy_credentials_file") as caught:
        configured_proxy(f"http://user:{SECRET}@proxy")
    assert SECRET not in str(caught.value)
