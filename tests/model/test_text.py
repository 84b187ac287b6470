"""What may be a secret is never quoted; what is not stays readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from pioneer_tunnel._model.keys import SigningIdentity
from pioneer_tunnel._model.text import cut, hide_secrets, redact_reason, shown

HUGE = 10**5000  # Python refuses to write it out


@pytest.mark.parametrize("seed", range(20))
def test_hide_secrets_hides_what_is_generated(seed: int) -> None:
    key = SigningIdentity.from_seed(bytes([seed]) * 32).public_key.raw.hex()
    assert hide_secrets(f"it is '{key}', which") == "it is '…', which"
    assert hide_secrets("relay-eu-west-1.getpioneer.dev:2333") == "relay-eu-west-1.getpioneer.dev:2333"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (True, "true"),
        (3, "3"),
        (1.5, "1.5"),
        ("a'\n", '"a\'\\n"'),
        (Path("a/b"), "'a/b'"),
        pytest.param(HUGE, "a number of more than 18 digits", id="huge"),
        ({"a": 1}, "a table"),
        ([1], "an array"),
        (b"bytes", "a value of type bytes"),
        ("x." * 1000, "'" + "x." * 59 + "…"),
    ],
)
def test_values_are_shown_short_and_printable(value: object, text: str | None) -> None:
    assert shown("name", value) == text


@pytest.mark.parametrize(
    "text",
    [
        "/var/lib/pioneer/remote-access/instance",
        "wss://relay-eu-west-1.getpioneer.dev/tunnel",
        "allowed is a whole number from 1 to 86400000",
        "restart_jitter_percentage",
        "ed25519:",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("key ptk1_a, it is", "key …, it is"),
        ("a/ptk1_a/b", "a/…/b"),
        ("kbQwJ9Zk1xN0pLr7sT2v", "…"),
        ("x=AbCdEfGhIj/KlMnOpQrStUv==.", "…."),
        ("//host/ab12cd34ef56ab12cd34ef56/x", "//host/…/x"),
    ],
)
def test_a_part_that_looks_generated_is_hidden(text: str, left: str) -> None:
    assert hide_secrets(text) == left


def test_a_reason_is_told_without_the_value_that_may_be_secret() -> None:
    words = "correct-horse-battery-staple"
    assert redact_reason(f"the address {words!r} has no port, write 'host:port'", words) == (
        "the address '…' has no port, write 'host:port'"
    )
    assert redact_reason("the address 'relay' has no port", "relay") == "the address 'relay' has no port"
    assert len(redact_reason("word " * 1000, None)) == 400


def test_what_is_too_long_is_cut() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "ab…"
