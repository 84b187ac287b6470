"""Keystores give back what was put there or nothing, and show keys nowhere: what every kind does."""

from __future__ import annotations

import base64
import contextlib
import copy
import logging
import pickle
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from crashing_files import names
from hypothesis import given, settings, strategies as st
from keystores import CANARY, PASSPHRASE, attempts_on
from shown import everything_shown

from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel.gateway.keystore import (
    DEFAULT_SECRET_REF,
    FileKeystore,
    KeyringKeystore,
    Keystore,
    check_secret_ref,
)

pytestmark = pytest.mark.usefixtures("cheap_scrypt")


REFERENCES: Final = st.from_regex(r"(?!\.)[A-Za-z0-9_.-]{1,64}", fullmatch=True)
NO_REFERENCES: Final = ["", ".", "..", ".hidden", "a/b", "../a", "a\0", "a b", "ä", "a\n", "a" * 65]


# What every keystore does


async def test_a_keystore_keeps_what_was_put_there(keystore: Keystore) -> None:
    assert isinstance(keystore, Keystore)
    first, second = new_relay_key(), new_relay_key()
    assert await keystore.get("a") is None
    assert not await keystore.exists("a")
    await keystore.delete("a")
    await keystore.put("a", first)
    await keystore.put("b.2_-", second)
    assert await keystore.get("a") == first
    assert await keystore.get("b.2_-") == second
    assert await keystore.exists("a")
    await keystore.put("a", second)
    assert await keystore.get("a") == second
    await keystore.delete("a")
    assert await keystore.get("a") is None
    assert not await keystore.exists("a")
    assert await keystore.get("b.2_-") == second


async def test_the_longest_and_strangest_keys_are_kept(keystore: Keystore) -> None:
    for text in ("k", "k" * 4096, "😀" * 4096, "schlüssel mit leerzeichen", "a\u2028b", "a=b;c"):
        await keystore.put("a", RelayKey(text))
        key = await keystore.get("a")
        assert key is not None
        assert key.reveal() == text.strip()


async def test_what_is_no_reference_is_refused(keystore: Keystore, tmp_path: Path) -> None:
    for reference in NO_REFERENCES:
        for name, attempt in attempts_on(keystore, reference).items():
            if name != "rotate":
                with pytest.raises(ValueError, match=r"the secret reference .* is not 1 to 64 of"):
                    await attempt()
    assert names(tmp_path) == []


async def test_what_is_no_relay_key_is_refused_without_showing_it(keystore: Keystore) -> None:
    text: Any = CANARY
    with pytest.raises(TypeError, match="a keystore stores a RelayKey, not str") as raised:
        await keystore.put("a", text)
    assert CANARY not in everything_shown(raised.value)
    assert not await keystore.exists("a")


async def test_every_method_is_a_checkpoint(keystore: Keystore) -> None:
    for attempt in attempts_on(keystore).values():
        with trio.testing.assert_checkpoints():
            await attempt()


async def test_cancelled_before_it_began_a_put_does_nothing(keystore: Keystore) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await keystore.put("a", new_relay_key())
    assert scope.cancelled_caught
    assert not await keystore.exists("a")


async def test_the_key_is_in_nothing_that_a_keystore_shows(
    keystore: Keystore, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    await keystore.put("a", RelayKey(CANARY))
    await keystore.get("a")
    if isinstance(keystore, FileKeystore):
        await keystore.rotate()
    logging.getLogger("test").debug("%s %r", keystore, keystore)
    shown = [repr(keystore), str(keystore), f"{keystore}"]
    if not isinstance(keystore, KeyringKeystore):  # its backend is somebody else's
        shown += [repr(vars(keystore)), *map(repr, vars(keystore).values())]
        for serialise in (pickle.dumps, copy.deepcopy):
            with contextlib.suppress(TypeError):
                shown.append(repr(serialise(keystore)))
    await keystore.delete("a")
    await keystore.put("b", RelayKey(CANARY))
    shown += [caplog.text, *capfd.readouterr()]
    for text in shown:
        assert CANARY not in text
        assert PASSPHRASE not in text
    for path in folder.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (CANARY, PASSPHRASE):
                assert secret.encode() not in content
                assert base64.b64encode(secret.encode()).rstrip(b"=")[:-1] not in content
                assert secret.encode().hex().encode() not in content


@given(reference=REFERENCES)
@settings(max_examples=30, deadline=None)
def test_references_are_taken_as_they_are(reference: str) -> None:
    assert check_secret_ref(reference) == reference


def test_a_reference_that_may_be_the_key_itself_is_not_quoted() -> None:
    with pytest.raises(ValueError, match=r"the secret reference '\.\.' is not"):
        check_secret_ref("..")
    with pytest.raises(ValueError, match=r"the secret reference \(78 characters, not shown\) is not"):
        check_secret_ref(CANARY * 3 + "......")
    assert DEFAULT_SECRET_REF == "remote_access"
