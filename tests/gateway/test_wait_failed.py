"""`RemoteAccess.wait_failed`: it returns after a failure that is final, and after no other."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import trio
from gateway import KEY, Gateway, in_virtual_time

from pioneer_tunnel._model.errors import RelayConnectError
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.transports.interface import Deliver, Report, Session, Target


async def refuses(
    target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
) -> NoReturn:
    await trio.lowlevel.checkpoint()
    raise RelayConnectError("nobody is there")


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    made = Gateway(tmp_path)
    made.store()
    return made


@in_virtual_time
async def test_a_missing_key_is_final_until_there_is_one(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        status = await remote_access.wait_failed()
        assert (status.state, status.error_kind) == (State.FAILED, ErrorKind.MISSING_KEY)
        await remote_access.apply(SettingsUpdate(key=KEY))
        with trio.move_on_after(3600) as waiting:
            await remote_access.wait_failed()
        assert waiting.cancelled_caught
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_failure_that_is_retried_is_not_final_and_the_last_one_is(gateway: Gateway) -> None:
    await gateway.keystore.put("remote_access", KEY)
    for config in ({}, {"max_restarts": 20}):
        remote_access = gateway.remote_access(config, transports={"websocket": refuses})
        async with trio.open_nursery() as nursery:
            await nursery.start(remote_access.run)
            with trio.move_on_after(3600) as waiting:
                status = await remote_access.wait_failed()
                assert status.error_kind is ErrorKind.RESTART_LIMIT_REACHED
            assert remote_access.status.state is State.FAILED
            assert waiting.cancelled_caught == (not config)
            nursery.cancel_scope.cancel()
