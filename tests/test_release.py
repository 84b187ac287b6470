"""This version works with earlier ones, in both directions, and reads what they stored.

An earlier version is unpacked from the history of this checkout. The package is pure Python, so its wheel has the same
files. It runs with the dependencies that are installed here.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

import pytest
import trio
from programs import KEY, SOURCE, relay_in, running

from pioneer_tunnel import FileKeystore, RemoteAccess, RemoteAccessConfig, SettingsFile

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[1]

RELEASES: Final = {
    "before 0.1.0": "5b05f5e64dcc0c56d58d444005c66dfc9808c2fb",
    "0.1.0": "e96fed6048447a2c3a855b0cfbc9845bb0417ce7",
}
"""Their commits."""

STORE: Final = """
import sys
import trio
from pathlib import Path
from pioneer_tunnel import (
    FileKeystore, RelayKey, RemoteAccess, RemoteAccessConfig, SettingsFile, SettingsUpdate
)

async def main():
    folder, key = Path(sys.argv[1]), RelayKey(sys.argv[2])
    remote_access = RemoteAccess(
        RemoteAccessConfig.load(folder / "gateway.toml"),
        settings=SettingsFile(folder / "gateway-settings.toml"),
        keystore=FileKeystore(folder / "keystore"),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        await remote_access.apply(SettingsUpdate(enabled=True, server="ws://127.0.0.1:2", key=key))
        async for status in remote_access.watch():
            if status.retry_at_unix is not None:
                break
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.fixture(scope="module", params=RELEASES)
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds an earlier version of the package."""
    packed = subprocess.run(
        ["git", "archive", "--format=tar", RELEASES[request.param], "pioneer_tunnel"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if packed.returncode:
        pytest.skip(f"this checkout has no history back to {request.param}: {packed.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("old_end", ["relay", "gateway"])
def test_it_works_with_an_earlier_version(earlier: Path, old_end: str, tmp_path: Path, local_gateway: str) -> None:
    relay_source, gateway_source = (earlier, SOURCE) if old_end == "relay" else (SOURCE, earlier)
    with relay_in(tmp_path, source=relay_source) as relay:
        arguments = ("expose", local_gateway, "--relay", relay.url, "--key-file", tmp_path / "key")
        with running(*arguments, source=gateway_source) as exposed:
            exposed.wait_for("connected")
            relay.ask_until("/first", b"hello from /first")
            relay.program.process.kill()
            relay.program.process.wait()
            exposed.wait_for("reconnecting")
            with running("relay", "--config", tmp_path / "relay.toml", source=relay_source) as again:
                again.wait_for("gateways at")
                relay.ask_until("/again", b"hello from /again")


async def test_it_reads_what_an_earlier_version_stored(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(
        """
        [gateway.remote_access]
        relay_addr = "ws://127.0.0.1:1"
        allow_server_override = true
        """
    )
    environment = os.environ | {"PYTHONPATH": str(earlier)}
    subprocess.run([sys.executable, "-c", STORE, str(tmp_path), KEY.reveal()], env=environment, check=True)
    instance = (tmp_path / "remote-access" / "instance").read_text()
    remote_access = RemoteAccess(
        RemoteAccessConfig.load(tmp_path / "gateway.toml"),
        settings=SettingsFile(tmp_path / "gateway-settings.toml"),
        keystore=FileKeystore(tmp_path / "keystore"),
    )
    snapshot = await remote_access.snapshot()
    assert (snapshot.enabled, snapshot.server, snapshot.has_key) == (True, "ws://127.0.0.1:2", True)
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        async for status in remote_access.watch():
            if status.retry_at_unix is not None:
                break
        nursery.cancel_scope.cancel()
    assert (tmp_path / "remote-access" / "instance").read_text() == instance
