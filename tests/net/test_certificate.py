"""`certificate`: the newest whole pair of two files, and never half of one."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives import serialization

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel.testing.virtual_time import stop_the_clock_for_threads

CA: Final = trustme.CA()
FIRST: Final = CA.issue_cert("first.test")
SECOND: Final = CA.issue_cert("second.test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path, FIRST)
    return tmp_path


def put(folder: Path, pair: trustme.LeafCert, *, certificate: bool = True, private_key: bool = True) -> None:
    """Write as people do who renew: into a new file that takes the old one's place."""
    if certificate:
        replace(folder / "tls.crt", b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    if private_key:
        replace(folder / "tls.key", pair.private_key_pem.bytes())


def replace(file: Path, data: bytes) -> None:
    file.with_suffix(".new").write_bytes(data)
    file.with_suffix(".new").replace(file)


def certificate_in(folder: Path) -> Certificate:
    return Certificate(folder / "tls.crt", folder / "tls.key")


async def in_use(certificate: Certificate) -> ssl.SSLContext:
    """The context of the next handshake, while a clock that jumps stands still."""
    stop_the_clock_for_threads()
    return await certificate.context()


def presented(context: ssl.SSLContext) -> str:
    """The name in the certificate that a client is shown."""
    client_context = ssl.create_default_context()
    client_context.check_hostname = False
    CA.configure_trust(client_context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = client.getpeercert()
    assert shown is not None
    names = dict(shown["subjectAltName"])  # type: ignore[arg-type]
    return str(names["DNS"])


def test_it_speaks_no_old_tls(folder: Path) -> None:
    async def main() -> ssl.SSLContext:
        return await certificate_in(folder).context()

    context = trio.run(main)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert presented(context) == "first.test"


async def test_a_new_pair_is_used_within_a_second(
    folder: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    certificate = certificate_in(folder)
    before = await in_use(certificate)
    put(folder, SECOND)
    assert await in_use(certificate) is before, "it was looked at just now"
    await trio.sleep(1)
    assert presented(await in_use(certificate)) == "second.test"
    assert await in_use(certificate) is not before
    assert "tls.crt was renewed" in caplog.text


async def test_what_does_not_change_is_not_read_again(folder: Path, autojump_clock: trio.testing.MockClock) -> None:
    certificate = certificate_in(folder)
    contexts = set()
    for _ in range(5):
        contexts.add(await in_use(certificate))
        await trio.sleep(2)
    assert len(contexts) == 1


@pytest.mark.parametrize("certificate_first", [True, False])
async def test_half_a_pair_is_not_used_and_the_other_half_completes_it(
    folder: Path,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    certificate_first: bool,
) -> None:
    certificate = certificate_in(folder)
    put(folder, SECOND, certificate=certificate_first, private_key=not certificate_first)
    for _ in range(3):
        assert presented(await in_use(certificate)) == "first.test"
        await trio.sleep(1)
    (warning,) = caplog.records
    assert "tls.crt" in warning.getMessage()
    assert "tls.key" in warning.getMessage()
    assert "the key is not the certificate's" in warning.getMessage()
    put(folder, SECOND)
    assert presented(await in_use(certificate)) == "second.test"
    assert len(caplog.records) == 1


async def test_files_that_vanish_or_break_leave_the_old_pair(
    folder: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = certificate_in(folder)
    (folder / "tls.key").rename(folder / "elsewhere")
    await trio.sleep(1)
    assert presented(await in_use(certificate)) == "first.test"
    assert f"{folder / 'tls.key'} cannot be read: No such file or directory" in caplog.text
    (folder / "tls.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    await trio.sleep(1)
    assert presented(await in_use(certificate)) == "first.test"
    put(folder, SECOND)
    await trio.sleep(1)
    assert presented(await in_use(certificate)) == "second.test"
    assert len(caplog.records) == 2


async def test_a_link_that_points_elsewhere_is_a_change(folder: Path, autojump_clock: trio.testing.MockClock) -> None:
    """As certbot and Kubernetes renew."""
    for name, pair in (("1", FIRST), ("2", SECOND)):
        (folder / name).mkdir()
        put(folder / name, pair)
    for file in ("tls.crt", "tls.key"):
        # Of one moment and one size, as a copy may be: what tells them apart is the file itself.
        os.utime(folder / "1" / file, ns=(10**18, 10**18))
        os.utime(folder / "2" / file, ns=(10**18, 10**18))
    (folder / "live").symlink_to("1")
    certificate = certificate_in(folder / "live")
    assert presented(await in_use(certificate)) == "first.test"
    (folder / "live.new").symlink_to("2")
    (folder / "live.new").replace(folder / "live")
    await trio.sleep(1)
    assert presented(await in_use(certificate)) == "second.test"


def encrypted(pair: trustme.LeafCert) -> bytes:
    key = serialization.load_pem_private_key(pair.private_key_pem.bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tls.crt", None, r"tls\.crt cannot be read: No such file or directory"),
        ("tls.key", None, r"tls\.key cannot be read: No such file or directory"),
        ("tls.crt", b"", "one of them is not PEM"),
        ("tls.key", b"nonsense", "one of them is not PEM"),
        ("tls.key", SECOND.private_key_pem.bytes(), "the key is not the certificate's"),
        ("tls.key", encrypted(FIRST), "encrypted with a passphrase"),
    ],
    ids=["no certificate", "no key", "empty", "no PEM", "another key", "encrypted"],
)
def test_a_pair_that_cannot_be_used_is_named(folder: Path, file: str, content: bytes | None, told: str) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InvalidSettingsError, match=told) as refused:
        certificate_in(folder)
    assert str(folder / "tls.crt") in str(refused.value)
    assert "PRIVATE" not in str(refused.value)


def test_a_folder_in_place_of_a_file_is_told(folder: Path) -> None:
    (folder / "tls.crt").unlink()
    shutil.copytree(folder, folder / "tls.crt")
    with pytest.raises(InvalidSettingsError, match=r"tls\.crt is not a regular file"):
        certificate_in(folder)
