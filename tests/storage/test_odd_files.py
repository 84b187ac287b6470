"""A FIFO, a device, a folder or a huge file in the place of a file that we read: refused, and never waited for."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import pytest
import trio
import trustme
from rig import KEY, relay_config

from pioneer_tunnel import EnvironmentKeystore, FileKeystore, RemoteAccessConfig, SettingsFile
from pioneer_tunnel._model.errors import TunnelError
from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel.cli.keys import read_key
from pioneer_tunnel.gateway.runtime_folder import load_instance
from pioneer_tunnel.relay import Relay, RelayConfig
from pioneer_tunnel.testing.virtual_time import stop_the_clock_for_threads

CA: Final = trustme.CA()
ISSUED: Final = CA.issue_cert("site.test")
GIBIBYTE: Final = 1024**3


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_huge(path: Path) -> None:
    path.touch(mode=0o600)
    os.truncate(path, GIBIBYTE)


PUT: Final[dict[str, Callable[[Path], object]]] = {
    "a FIFO": lambda path: os.mkfifo(path, 0o600),
    "a device": put_device,
    "a folder": lambda path: path.mkdir(mode=0o700),
    "a huge file": put_huge,
}


def certificate(path: Path) -> object:
    (path.parent / "good").write_bytes(ISSUED.private_key_pem.bytes())
    return Certificate(path, path.parent / "good")


def private_key(path: Path) -> object:
    (path.parent / "good").write_bytes(ISSUED.cert_chain_pems[0].bytes())
    return Certificate(path.parent / "good", path)


def instance(path: Path) -> object:
    path.parent.joinpath("runtime").mkdir(mode=0o700)
    path.rename(path.parent / "runtime" / "instance")
    return load_instance(path.parent / "runtime")


def stored_key(path: Path) -> object:
    store = FileKeystore(path.parent / "keys")
    trio.run(store.put, "reference", KEY)
    (kept,) = (file for file in (path.parent / "keys").iterdir() if file.name.startswith("reference"))
    kept.unlink()
    path.rename(kept)
    return trio.run(store.get, "reference")


READERS: Final[dict[str, Callable[[Path], object]]] = {
    "the relay's file": RelayConfig.load,
    "the gateway's file": RemoteAccessConfig.load,
    "the settings": lambda path: SettingsFile(path).read(),
    "a CA file": client_tls,
    "a certificate": certificate,
    "a private key": private_key,
    "the relay's identity": lambda path: Relay(relay_config(identity_key_file=path)),
    "a key file": lambda path: read_key(path, native=True),
    "a mounted key": lambda path: trio.run(EnvironmentKeystore(file=path).get, "remote_access"),
    "a stored key": stored_key,
    "the instance": instance,
}


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("reader", READERS)
def test_it_is_refused(tmp_path: Path, reader: str, put: str) -> None:
    PUT[put](tmp_path / "odd")
    with pytest.raises((TunnelError, click.ClickException), match=r"is not a regular file|is larger than"):
        READERS[reader](tmp_path / "odd")


async def test_a_certificate_that_becomes_a_fifo_holds_up_no_handshake(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key").write_bytes(ISSUED.private_key_pem.bytes())
    (tmp_path / "chain").write_bytes(ISSUED.cert_chain_pems[0].bytes())
    stop_the_clock_for_threads()
    used = Certificate(tmp_path / "chain", tmp_path / "key")
    before = await used.context()
    (tmp_path / "chain").unlink()
    os.mkfifo(tmp_path / "chain")
    await trio.sleep(1)
    assert await used.context() is before
    assert "chain is not a regular file" in caplog.text


async def test_while_one_looks_at_the_certificate_others_use_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_bytes(ISSUED.private_key_pem.bytes())
    (tmp_path / "chain").write_bytes(ISSUED.cert_chain_pems[0].bytes())
    used = Certificate(tmp_path / "chain", tmp_path / "key")
    looking, go_on = trio.Event(), trio.Event()

    async def hang(*_args: Any, **_options: Any) -> None:
        looking.set()
        await go_on.wait()

    monkeypatch.setattr(trio.to_thread, "run_sync", hang)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(used.context)
        await looking.wait()
        assert isinstance(await used.context(), ssl.SSLContext)
        go_on.set()
