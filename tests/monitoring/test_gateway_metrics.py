"""Metrics of `RemoteAccess` by its configuration."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import trio
from gateway import Gateway, running
from rig import KEY, RELAY_NAME, eventually, free_port, no_hang, read_all, relay_rig

from pioneer_tunnel import SettingsUpdate
from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.transports.built_in import TRANSPORTS


async def get(port: int, path: str) -> str:
    with no_hang():
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return (await read_all(stream)).decode()


async def test_remote_access_has_metrics_whatever_its_state(real_gateway: Gateway) -> None:
    port = free_port()
    async with relay_rig() as rig:
        config = {"relay_addr": f"ws://{RELAY_NAME}", "metrics": f"127.0.0.1:{port}"}
        remote_access = real_gateway.remote_access(config, transports=TRANSPORTS, dial=rig.dial)
        async with running(remote_access):

            async def listens() -> bool:
                try:
                    return "503" in await get(port, "/-/ready")
                except OSError:
                    return False

            await eventually(listens)
            assert 'pioneer_tunnel_gateway_state="disabled"} 1.0' in await get(port, "/metrics")
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote_access.settled()
            assert "200 " in (await get(port, "/-/ready")).partition("\r\n")[0]
            metrics = await get(port, "/metrics")
            assert 'pioneer_tunnel_gateway_state="connected"} 1.0' in metrics
            assert "pioneer_tunnel_gateway_sessions_total 1.0" in metrics
        with pytest.raises(OSError, match="connect"):
            await get(port, "/metrics")


async def test_remote_access_goes_on_without_metrics(real_gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig() as rig, trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, trio.aclose_forcefully, 0, host="127.0.0.1")
        (taken,) = await nursery.start(serve)
        metrics = f"127.0.0.1:{taken.socket.getsockname()[1]}"
        config = {"relay_addr": f"ws://{RELAY_NAME}", "metrics": metrics}
        remote_access = real_gateway.remote_access(config, transports=TRANSPORTS, dial=rig.dial)
        async with running(remote_access):
            await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
            with no_hang():
                await remote_access.settled()
                await eventually(lambda: f"cannot listen at {metrics}" in caplog.text)
            assert remote_access.status.error_kind is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("metrics", ["9101", "", 9101])
def test_it_needs_an_address(metrics: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingsError, match="metrics"):
        RemoteAccessConfig.from_table({"metrics": metrics}, base_dir=tmp_path)
