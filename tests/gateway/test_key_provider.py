"""A host that keeps its key elsewhere: when `RemoteAccess` asks for it, and what it does with each answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import trio
import trio.testing
from gateway import (
    EPOCH,
    KEY,
    OFF,
    ON,
    OTHER_KEY,
    Gateway,
    in_virtual_time,
    running,
    shown,
)

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    UnknownError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import SettingsFile, SettingsUpdate


def provider(*answers: RelayKey | Exception | None) -> Callable[[], Any]:
    """Gives one answer after another, the last one again and again."""
    left = list(answers)

    async def provide() -> RelayKey | None:
        await trio.lowlevel.checkpoint()
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return provide


@in_virtual_time
async def test_a_key_provider_is_asked_at_each_generation(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access(key_provider=provider(None, KEY, OTHER_KEY))
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.MISSING_KEY)
        for key in (KEY, OTHER_KEY):
            await remote_access.apply(OFF)
            await remote_access.apply(ON)
            await remote_access.settled()
            assert gateway.transport.attempts[-1].target.key == key


@in_virtual_time
async def test_a_key_that_is_kept_elsewhere_is_neither_saved_nor_cleared_here(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access(key_provider=provider(KEY))
    async with running(remote_access):
        await remote_access.settled()
        for update in (SettingsUpdate(enabled=False, key=OTHER_KEY), SettingsUpdate(enabled=False, clear_key=True)):
            with pytest.raises(InvalidSettingsError, match="elsewhere"):
                await remote_access.apply(update)
        assert gateway.stored().enabled
        assert await remote_access.has_key()
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_a_key_provider_that_raises_is_unknown_and_asked_again_as_the_policy_has_it(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.store()
    asked: list[float] = []
    answer = provider(*[LookupError("the vault is sealed")] * 3, KEY)

    async def key_provider() -> RelayKey | None:
        asked.append(trio.current_time())
        key: RelayKey | None = await answer()
        return key

    remote_access = gateway.remote_access(key_provider=key_provider)
    async with running(remote_access):
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        assert remote_access.status.retry_at_unix == EPOCH + 1
        await trio.sleep(6.9)
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        await trio.sleep(0.2)
        assert shown(remote_access) == (State.CONNECTED, None)
    assert asked == [0, 1, 3, 7]
    assert "the vault is sealed" in caplog.text
    assert all("vault" not in str(status) for status in remote_access.history)


@in_virtual_time
async def test_a_key_provider_that_keeps_raising_uses_the_restarts_up(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access({"max_restarts": 2}, key_provider=provider(LookupError()))
    async with running(remote_access):
        await trio.sleep(2.9)
        assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
        await trio.sleep(0.2)
        assert shown(remote_access) == (State.FAILED, ErrorKind.RESTART_LIMIT_REACHED)
        assert remote_access.status.retry_at_unix is None
        assert "2 restarts" in (remote_access.status.message or "")
        assert "LookupError" in (remote_access.status.message or "")
        await trio.sleep(3600)
        assert shown(remote_access) == (State.FAILED, ErrorKind.RESTART_LIMIT_REACHED)


@in_virtual_time
async def test_retry_now_cuts_the_wait_for_a_key_provider_short(gateway: Gateway) -> None:
    gateway.store()
    remote_access = gateway.remote_access({"restart_initial_ms": 30_000}, key_provider=provider(LookupError(), KEY))
    async with running(remote_access):
        await trio.sleep(1)
        remote_access.retry_now()
        await trio.sleep(1)
        assert shown(remote_access) == (State.CONNECTED, None)


@in_virtual_time
async def test_a_key_provider_that_never_answers_holds_up_nothing_but_its_generation(gateway: Gateway) -> None:
    async def key_provider() -> NoReturn:
        await trio.sleep_forever()
        raise AssertionError

    remote_access = gateway.remote_access(key_provider=key_provider)
    with trio.fail_after(1):
        async with running(remote_access):
            await remote_access.apply(ON)
            await trio.testing.wait_all_tasks_blocked()
            await remote_access.apply(OFF)
            await remote_access.settled()
            assert shown(remote_access) == (State.DISABLED, None)


@in_virtual_time
async def test_what_a_key_provider_raises_does_not_come_out_of_a_snapshot_bare(gateway: Gateway) -> None:
    remote_access = gateway.remote_access(key_provider=provider(LookupError("secret")))
    with pytest.raises(UnknownError) as raised:
        await remote_access.snapshot()
    assert "secret" not in str(raised.value)


@in_virtual_time
async def test_a_place_for_the_key_is_given_once(gateway: Gateway) -> None:
    wrong: list[dict[str, Any]] = [{}, {"keystore": MemoryKeystore(), "key_provider": provider(None)}]
    for arguments in wrong:
        with pytest.raises(TypeError, match="either keystore or key_provider"):
            RemoteAccess(gateway.config(), settings=SettingsFile(gateway.settings_path), **arguments)
