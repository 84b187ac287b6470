"""The control socket of a running relay: commands find it by the relay's file, and get all its counts."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
import trio
from rig import KEY

from pioneer_tunnel._control import connect
from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel._wire.json_rpc import RpcError
from pioneer_tunnel.relay import Relay, RelayConfig
from pioneer_tunnel.relay.administration import running
from pioneer_tunnel.relay.administration.running import ask_running, serve_control_socket

CONFIG: Final = RelayConfig(
    control_addr="127.0.0.1:0",
    ingress_addr="127.0.0.1:0",
    id="relay-1",
    public_names=["relay.test"],
    tunnels=[{"id": "office", "url": "http://office.test", "key": KEY.identity().public_key}],
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a relay, in a world without a folder of systemd, of the user, or of root."""
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(running, "_SYSTEM", tmp_path / "none")
    folder = tmp_path / "etc"
    folder.mkdir()
    return folder / "relay.toml"


async def answers(config: Path) -> None:
    """Wait until a relay answers."""
    with trio.fail_after(60):
        found = None
        while found is None:
            await trio.sleep(0.01)
            with suppress(StorageError):  # it ends at this moment
                found = await ask_running(config)


async def test_a_relay_is_found_beside_its_file(config: Path) -> None:
    assert await ask_running(config) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control_socket, Relay(CONFIG), config)
        await answers(config)
        assert [path.name for path in config.parent.iterdir()] == ["relay.toml.run"]
        found = await ask_running(config)
        assert found is not None
        assert [*found.stats.tunnels] == ["office"]
        assert await ask_running(config.with_name("other.toml")) is None
        nursery.cancel_scope.cancel()
    assert await ask_running(config) is None


async def test_a_relay_is_found_in_the_folder_that_there_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd tells the service its folder, and not the command that looks for it."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(running, "_SYSTEM", tmp_path / "run")
    (tmp_path / "run" / "pioneer-tunnel").mkdir(mode=0o700)
    (tmp_path / "user").mkdir(mode=0o700)
    for variable, folder in (
        ("RUNTIME_DIRECTORY", tmp_path / "run" / "pioneer-tunnel"),
        ("XDG_RUNTIME_DIR", tmp_path / "user"),
        ("NOTHING", tmp_path / "run"),
    ):
        monkeypatch.setenv(variable, str(folder))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control_socket, Relay(CONFIG), config)
            await answers(config)
            assert [*folder.glob("**/relay-*/control.sock")]
            monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
            link = config.with_name("link")
            if not link.exists():
                link.symlink_to(config.parent, target_is_directory=True)
            assert await ask_running(link / "relay.toml") is not None, "by another path to its folder"
            nursery.cancel_scope.cancel()
        monkeypatch.delenv(variable, raising=False)
    assert [*config.parent.iterdir()] == [config.with_name("link")]


async def test_a_relay_with_many_tunnels_tells_of_all(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_PAGE_BYTES", 4096)
    names = [f"tunnel-{number}" for number in range(100)]
    tunnels = [
        {"id": name, "url": f"http://{name}.test", "key": new_relay_key().identity().public_key} for name in names
    ]
    many = RelayConfig(
        control_addr="127.0.0.1:0", ingress_addr="127.0.0.1:0", id="r", public_names=["relay.test"], tunnels=tunnels
    )
    relay = Relay(many)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control_socket, relay, config)
        await answers(config)
        found = await ask_running(config)
        assert found is not None
        assert found.stats == relay.stats()
        assert [*found.stats.tunnels] == names
        async with connect(config.with_name("relay.toml.run")) as client:
            assert client is not None
            page = await client.call("relay/tunnels", {"start": 90})
            assert next(iter(page["tunnels"])) == "tunnel-90"
            for params in ({"start": -1}, {"start": "0"}):
                with pytest.raises(RpcError, match="start: allowed is"):
                    await client.call("relay/tunnels", params)
            with pytest.raises(RpcError, match="'relay/nothing'"):
                await client.call("relay/nothing")
        nursery.cancel_scope.cancel()


async def test_the_next_process_of_a_relay_waits_for_the_socket(config: Path) -> None:
    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def serve_first() -> None:
            with first:
                await serve_control_socket(Relay(CONFIG), config)

        nursery.start_soon(serve_first)
        await answers(config)
        nursery.start_soon(serve_control_socket, Relay(CONFIG), config)
        await trio.sleep(0.5)
        first.cancel()
        await answers(config)
        nursery.cancel_scope.cancel()


async def test_a_relay_that_cannot_be_asked_says_so_and_goes_on(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    config.with_name("relay.toml.run").write_text("a file")
    with caplog.at_level(logging.WARNING):
        await serve_control_socket(Relay(CONFIG), config)
    assert "'relay status' cannot ask this relay: " in caplog.text
    with pytest.raises(StorageError, match=r"relay\.toml\.run"):
        await ask_running(config)


async def test_a_relative_runtime_folder_counts_for_none(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the socket would be where the relay happens to have been started."""
    (tmp_path / "here").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_RUNTIME_DIR", ".")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control_socket, Relay(CONFIG), config)
        await answers(config)
        assert [*(tmp_path / "here").iterdir()] == []
        nursery.cancel_scope.cancel()
