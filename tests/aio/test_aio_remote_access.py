"""`RemoteAccess` under asyncio: as exact as its Trio face."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aio_rig import URL, ask, hello, options, remote_access
from gateway import Gateway
from rig import KEY, RelayRig, request

import pioneer_tunnel
from pioneer_tunnel import InvalidSettingsError, RpcError, SettingsUpdate, State
from pioneer_tunnel.aio import RemoteAccess, RemoteAccessRpc, open_tunnel
from pioneer_tunnel.gateway.rpc import STATUS_CHANGED


def state(remote: RemoteAccess) -> State:
    return remote.status.state


def test_the_access_log_of_remote_access_is_reopened(relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path) -> None:
    log = tmp_path / "access.log"

    async def main() -> None:
        async with remote_access(relay_in_thread, tmp_path, access_log=log) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            log.rename(tmp_path / "access.log.1")
            remote.reopen_access_log()
            while not log.exists():
                await asyncio.sleep(0.01)

    on_loop(main())


def test_remote_access_is_switched_on_and_off(relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay_in_thread, tmp_path, app=hello) as remote:
            assert state(remote) is State.DISABLED
            assert not await remote.has_key()
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            assert state(remote) is State.CONNECTED
            assert (await remote.snapshot()).has_key
            assert (await remote.stats()).since_unix > 0
            assert (await remote.settings()).enabled
            assert (await ask(relay_in_thread, request())).endswith(b"hello")
            await remote.configure(Gateway(tmp_path).config(relay_addr=URL, restart_initial_ms=11))
            await remote.settled()
            assert remote.config.restart_initial_ms == 11
            remote.retry_now()
            with pytest.raises(RuntimeError, match="running already"):
                await remote.__aenter__()
            await remote.apply(SettingsUpdate(enabled=False))
            await remote.settled()
            assert state(remote) is State.DISABLED
        assert state(remote) is State.STOPPED
        assert remote.history[-1] == remote.status
        assert remote.history_dropped == 0
        with pytest.raises(RuntimeError, match="not running"):
            await remote.apply(SettingsUpdate(enabled=True))
        with pytest.raises(RuntimeError, match="not running"):
            remote.watch()
        async with remote:
            assert state(remote) is State.DISABLED

    on_loop(main())


def test_a_tunnel_and_remote_access_stop_in_order(relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread)) as tunnel:
            await tunnel.wait_connected()
            assert (await tunnel.stats()).sessions_total == 1
            await tunnel.drain(1.0)
            assert tunnel.status.state is State.STOPPED
            with pytest.raises(RuntimeError, match="closed"):
                await tunnel.wait_connected()
        async with remote_access(relay_in_thread, tmp_path, app=hello) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            await remote.stop()
            assert state(remote) is State.STOPPED
            assert (await remote.settings()).enabled
            await remote.stop()

    on_loop(main())


def test_a_request_that_outlives_its_generation_hears_that_the_visitor_has_gone(
    relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    async def main() -> None:
        asked, over = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            asked.set()
            heard.append((await receive())["type"])
            over.set()

        async with remote_access(relay_in_thread, tmp_path, app=app, apply_grace_ms=1) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", relay_in_thread.addresses.tunnels["office"].port
            )
            writer.write(request())
            await asked.wait()
            await remote.apply(SettingsUpdate(enabled=False))
            await over.wait()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()

    on_loop(main())
    assert heard == ["http.disconnect"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_remote_access_raises_the_errors_of_its_trio_face(
    relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with remote_access(relay_in_thread, tmp_path) as remote:
            with pytest.raises(InvalidSettingsError, match="public half"):
                await remote.apply(SettingsUpdate(key=pioneer_tunnel.RelayKey(str(KEY.identity().public_key))))

    on_loop(main())


def test_remote_access_answers_json_rpc(relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay_in_thread, tmp_path) as remote:
            rpc = RemoteAccessRpc(remote, other_sections=lambda: {"gateway": asyncio.current_task() is not None})
            notifications = rpc.notifications()
            update = {"update": {"remote_access": {"enabled": True, "key": KEY.reveal()}}}
            answer = await rpc.handle("settings/update", update)
            assert answer["settings"]["gateway"] is True
            assert answer["settings"]["remote_access"]["has_key"] is True
            notified = await anext(notifications)
            assert notified["method"] == STATUS_CHANGED
            with pytest.raises(RpcError, match="nonsense"):
                await rpc.handle("nonsense")
            assert (await rpc.handle("settings/get"))["settings"]["remote_access"]["enabled"] is True

    on_loop(main())


def test_no_traceback_of_a_call_shows_the_key(relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path) -> None:
    """Also one with the local variables of each frame."""
    import traceback

    wrong = {"update": {"remote_access": {"key": KEY.reveal() + "\0"}}}

    async def main() -> str:
        async with remote_access(relay_in_thread, tmp_path) as remote:
            try:
                await RemoteAccessRpc(remote).handle("settings/update", wrong)
            except RpcError as error:
                found = traceback.TracebackException.from_exception(error, capture_locals=True)
                ours = [frame for frame in found.stack if "/pioneer_tunnel/" in frame.filename]
                assert len(ours) > 3, ours
                return "\n".join(str(frame.locals) for frame in ours)
        raise AssertionError

    assert KEY.reveal() not in on_loop(main())


def test_an_apply_that_is_cancelled_is_over_when_the_task_is(
    relay_in_thread: RelayRig, on_loop: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with remote_access(relay_in_thread, tmp_path) as remote:
            for turns in range(10):
                task = asyncio.create_task(remote.apply(SettingsUpdate(server=f"wss://relay-{turns}.test")))
                await asyncio.sleep(turns * 0.001)
                task.cancel()
                await asyncio.wait([task])
                before = await remote.settings()
                await asyncio.sleep(0.01)
                assert await remote.settings() == before

    on_loop(main())
