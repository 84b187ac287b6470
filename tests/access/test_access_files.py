"""htpasswd files and files of tokens: what they may hold, and that a change of them counts."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
from pathlib import Path

import bcrypt
import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from pioneer_tunnel import InvalidSettingsError, StorageError
from pioneer_tunnel.access import htpasswd
from pioneer_tunnel.access.htpasswd import Htpasswd
from pioneer_tunnel.access.secret_file import CHECK_INTERVAL, SecretFile
from pioneer_tunnel.access.tokens import Tokens

HASHED = bcrypt.hashpw(b"right", b"$2b$04$" + b"." * 22)  # the same each time: it is in names of tests
TOKEN = b"0123456789abcdef.~+/-_=="


def test_users_with_bcrypt_hashes() -> None:
    users = Htpasswd.parse(b"# visitors\n\nann:" + HASHED + b"\nb\xc3\xb6b:" + HASHED.replace(b"$2b", b"$2y") + b"\r\n")
    assert users.verify(b"ann", b"right")
    assert users.verify("böb".encode(), b"right")
    assert not users.verify(b"ann", b"wrong")
    assert not users.verify(b"nobody", b"right")
    assert not users.verify(b"ann", b"right\0")
    assert HASHED.decode() not in repr(users)


def test_a_long_password_is_not_its_beginning() -> None:
    users = Htpasswd.parse(b"ann:" + bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)))
    assert users.verify(b"ann", b"x" * 72)
    assert not users.verify(b"ann", b"x" * 73)


def test_an_unknown_user_costs_what_the_slowest_known_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Htpasswd.parse(b"ann:" + HASHED + b"\nbob:" + bcrypt.hashpw(b"right", bcrypt.gensalt(5)))
    costs: list[bytes] = []

    def checkpw(_password: bytes, hashed: bytes) -> bool:
        costs.append(hashed[4:6])
        return False

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    users.verify(b"bob", b"wrong")
    users.verify(b"nobody", b"wrong")
    users.verify(b"nobody", b"x" * 73)
    assert costs == [b"05", b"05", b"05"]


@given(password=st.binary(max_size=80))
def test_nobody_has_no_password(password: bytes) -> None:
    assert not Htpasswd.parse(b"ann:" + HASHED).verify(b"nobody", password)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"# nobody\n", b"ann", b":" + HASHED, b"ann:secret", b"ann:$apr1$x$y", b"ann:{SHA}x",
        b"ann:" + HASHED[:-1], b"ann:" + HASHED.replace(b"$2b", b"$2a"),
        b"ann:" + HASHED.replace(b"$04", b"$31"),
        b"ann:" + HASHED.replace(b"$04", b"$03"), b"ann:" + HASHED + b"\nann:" + HASHED,
        b"a" * 256 + b":" + HASHED,
    ],
)  # fmt: skip
def test_other_content_is_refused_and_not_quoted(content: bytes) -> None:
    with pytest.raises(InvalidSettingsError) as raised:
        Htpasswd.parse(content)
    assert "secret" not in str(raised.value)


def test_without_bcrypt_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(htpasswd, "_CAN_CHECK", False)
    with pytest.raises(InvalidSettingsError, match=r"pioneer-tunnel\[access\]"):
        Htpasswd.parse(b"ann:" + HASHED)


@pytest.mark.skipif(shutil.which("htpasswd") is None, reason="htpasswd is not installed")
def test_what_htpasswd_writes(tmp_path: Path) -> None:
    file = tmp_path / "visitors"
    subprocess.run(["htpasswd", "-cbB", "-C", "5", file, "ann", "right"], check=True, capture_output=True)
    assert Htpasswd.parse(file.read_bytes()).verify(b"ann", b"right")
    subprocess.run(["htpasswd", "-bm", file, "bob", "right"], check=True, capture_output=True)
    with pytest.raises(InvalidSettingsError, match="line 2 has another hash than bcrypt"):
        Htpasswd.parse(file.read_bytes())


def test_tokens_with_names_and_as_digests() -> None:
    digest = hashlib.sha256(b"another-token-0123").hexdigest().encode()
    tokens = Tokens.parse(b"# ours\n" + TOKEN + b"\nci = third-token-012345\n\nbob@test=sha256:" + digest)
    assert all(map(tokens.holds, (TOKEN, b"third-token-012345", b"another-token-0123")))
    assert not any(map(tokens.holds, (b"", b"ci", digest, b"sha256:" + digest, TOKEN[:-1], b"third-token-01234")))
    assert digest.decode() not in repr(tokens)


@pytest.mark.parametrize(
    "content",
    [b"", b"#\n", b"too-short", b"name = too-short", b"has spaces in it now", b"sha256:00", b"t\xc3\xb6ken-0123456789"],
)
def test_other_tokens_are_refused_and_not_quoted(content: bytes) -> None:
    with pytest.raises(InvalidSettingsError) as raised:
        Tokens.parse(content)
    assert "too-short" not in str(raised.value)


async def test_a_file_is_read_again_when_it_changes(
    tmp_path: Path, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    file = SecretFile(path, Tokens.parse, limit=1000)

    async def checked() -> Tokens | None:
        mock_clock.jump(CHECK_INTERVAL)
        assert not file.is_fresh(trio.current_time())
        await file.check()
        assert file.is_fresh(trio.current_time())
        return file.value

    assert await checked() is None
    assert await checked() is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    path.write_bytes(TOKEN)
    path.chmod(0o600)
    first = await checked()
    assert first is not None
    assert await checked() is first
    path.write_bytes(b"too-short")
    assert await checked() is first
    path.write_bytes(b"another-token-0123")
    second = await checked()
    assert second is not None
    assert not second.holds(TOKEN)
    path.chmod(0o640)
    assert await checked() is second
    assert "chmod 600" in caplog.text
    path.unlink()
    assert await checked() is second
    with pytest.raises(StorageError, match="does not exist"):
        file.load()


async def test_many_requests_wait_for_the_first_reading(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(TOKEN)
    path.chmod(0o600)
    file = SecretFile(path, Tokens.parse, limit=1000)
    async with trio.open_nursery() as nursery:
        for _ in range(20):

            @nursery.start_soon
            async def check() -> None:
                await file.check()
                assert file.value is not None
