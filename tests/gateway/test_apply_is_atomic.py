"""An update is stored whole or not at all, whatever fails, wherever it crashes, and whenever it is cancelled."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final, NoReturn

import pytest
import trio
import trio.testing
from crashing_files import STEPS, Crash, crash_after
from gateway import (
    CLEAR_KEY,
    KEY,
    NEW_KEY,
    OTHER_KEY,
    Gateway,
    connected,
    failing_once,
    in_virtual_time,
    running,
    shown,
)
from statuses import states_of

from pioneer_tunnel._model.errors import (
    StorageError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate
from pioneer_tunnel.testing import ScriptedTransport


@in_virtual_time
async def test_when_the_settings_cannot_be_written_the_old_key_is_put_back(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    for old in (None, KEY):
        if old is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old)
        with failing_once("replace"), pytest.raises(StorageError, match="gateway-settings"):
            await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
        assert await gateway.stored_key() == old
        assert gateway.stored() == Settings()


@pytest.mark.parametrize("late", [False, True])
@in_virtual_time
async def test_when_the_key_cannot_be_deleted_the_settings_are_put_back(gateway: Gateway, late: bool) -> None:
    remote_access = gateway.remote_access()
    async with connected(remote_access):
        await remote_access.apply(SettingsUpdate(server="wss://first.test"))
        await remote_access.settled()
        history = remote_access.history
        (gateway.keystore.failing_late if late else gateway.keystore.failing).add("delete")
        with pytest.raises(StorageError, match="cannot delete"):
            await remote_access.apply(SettingsUpdate(enabled=False, server="", clear_key=True))
        assert gateway.stored() == Settings(enabled=True, server="wss://first.test")
        assert await gateway.stored_key() == KEY
        await trio.sleep(10)
        assert remote_access.history == history


@pytest.mark.parametrize("late", [False, True])
@in_virtual_time
async def test_when_the_key_cannot_be_saved_nothing_is_changed(gateway: Gateway, late: bool) -> None:
    remote_access = gateway.remote_access()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    (gateway.keystore.failing_late if late else gateway.keystore.failing).add("put")
    with pytest.raises(StorageError, match="cannot put"):
        await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
    assert gateway.stored() == Settings()
    assert await gateway.stored_key() == KEY


@in_virtual_time
async def test_what_could_not_be_put_back_is_told(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_access = gateway.remote_access()
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)

    def fail(*_: object, **__: object) -> NoReturn:
        gateway.keystore.failing.add("put")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError) as raised:
        await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
    assert "gateway-settings" in str(raised.value)
    assert "nor could the relay key be put back" in str(raised.value)
    assert "nor could the relay key be put back" in caplog.text


@in_virtual_time
async def test_a_key_that_cannot_be_opened_is_replaced_or_cleared(gateway: Gateway) -> None:
    remote_access = gateway.remote_access()
    for update, key in ((NEW_KEY, OTHER_KEY), (CLEAR_KEY, None)):
        await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
        gateway.keystore.failing.add("get")
        await remote_access.apply(update)
        assert await gateway.stored_key() == key


UPDATES: Final = {
    "save": (None, SettingsUpdate(enabled=True, server="wss://new.test", key=OTHER_KEY), OTHER_KEY),
    "replace": (KEY, SettingsUpdate(enabled=True, server="wss://new.test", key=OTHER_KEY), OTHER_KEY),
    "clear": (KEY, SettingsUpdate(enabled=True, server="wss://new.test", clear_key=True), None),
    "settings alone": (KEY, SettingsUpdate(enabled=True, server="wss://new.test"), KEY),
}
NEW_SETTINGS: Final = Settings(enabled=True, server="wss://new.test")


@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_whatever_fails_once_leaves_all_old_or_all_new(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
) -> None:
    """Each call of the operating system that writes fails in its turn, the file keystore's and the settings' alike."""
    outcomes = set()
    for name in STEPS:
        for after in range(30):
            folder = tmp_path / f"{name}-{after}"
            folder.mkdir()
            gateway = Gateway(folder, keystore=FileKeystore(folder / "keystore"))
            if old_key is not None:
                await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
            error = None
            with failing_once(name, after=after) as failed:
                try:
                    await gateway.remote_access().apply(update)
                except StorageError as raised:
                    error = raised
            found = gateway.stored(), await gateway.stored_key()
            assert found == ((NEW_SETTINGS, new_key) if error is None else (Settings(), old_key)), (name, after)
            outcomes.add(error is None)
            if not failed:
                break
        else:
            pytest.fail(f"there is no end to the calls of {name}")
    assert outcomes == {True, False}


@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_a_crash_at_any_moment_leaves_each_store_whole_and_the_start_goes_on(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
) -> None:
    allowed = {(Settings(), old_key), (NEW_SETTINGS, new_key)}
    # A new key is stored before the settings are, and cleared after them.
    allowed.add((NEW_SETTINGS, old_key) if update.deletes_key else (Settings(), new_key))
    found = set()
    for count in range(200):
        folder = tmp_path / str(count)
        folder.mkdir()
        gateway = Gateway(folder, keystore=FileKeystore(folder / "keystore"))
        if old_key is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
        crashed = False
        with crash_after(count):
            try:
                await gateway.remote_access().apply(update)
            except Crash:
                crashed = True
        stored = gateway.stored(), await gateway.stored_key()
        assert stored in allowed, f"after {count} calls"
        found.add(stored)
        remote_access = gateway.remote_access()
        async with running(remote_access):
            await remote_access.settled()
            expected = (
                (State.DISABLED, None)
                if not stored[0].enabled
                else (State.FAILED, ErrorKind.MISSING_KEY)
                if stored[1] is None
                else (State.CONNECTED, None)
            )
            assert shown(remote_access) == expected
        if not crashed:
            break
    else:
        pytest.fail("there is no end to the calls")
    assert found == allowed


class CancelAtStep(trio.abc.Instrument):
    """Cancels a task when it has come to its checkpoint number so and so."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task, self._scope, self._left = task, scope, step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


@pytest.mark.parametrize("waiting", [False, True], ids=["alone", "while another apply goes on"])
@pytest.mark.parametrize(("old_key", "update", "new_key"), UPDATES.values(), ids=UPDATES)
@in_virtual_time
async def test_cancelling_an_apply_at_any_point_loses_nothing(
    tmp_path: Path,
    old_key: RelayKey | None,
    update: SettingsUpdate,
    new_key: RelayKey | None,
    waiting: bool,
) -> None:
    """Before it has begun, nothing is changed and nothing handed over; from then on it is finished, and handed over."""
    done = []
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        gateway = Gateway(folder)
        if old_key is not None:
            await gateway.keystore.put(DEFAULT_SECRET_REF, old_key)
        remote_access = gateway.remote_access()
        async with running(remote_access) as nursery:
            if waiting:
                nursery.start_soon(remote_access.apply, SettingsUpdate(server="wss://before.test"))
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
            with trio.CancelScope() as scope:
                if step == 0:
                    scope.cancel()
                instrument = CancelAtStep(trio.lowlevel.current_task(), scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await remote_access.apply(update)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                await trio.lowlevel.checkpoint()
            await remote_access.settled()
            await trio.testing.wait_all_tasks_blocked()
            before = Settings(server="wss://before.test") if waiting else Settings()
            stored = gateway.stored(), await gateway.stored_key()
            assert stored in {(before, old_key), (NEW_SETTINGS, new_key)}, step
            done.append(stored[0] == NEW_SETTINGS)
            # What was made durable was handed over as well.
            connected_or_not = State.FAILED if new_key is None else State.CONNECTED
            assert remote_access.status.state is (connected_or_not if done[-1] else State.DISABLED)
        if not scope.cancelled_caught:
            break
    else:
        pytest.fail("there is no end to the checkpoints")
    assert done == sorted(done)
    assert set(done) == {False, True}


@in_virtual_time
async def test_a_plan_is_never_made_of_half_an_apply(gateway: Gateway) -> None:
    """An apply that fails while `run` reads: what it took back is not acted upon."""
    gateway.store("enabled = true")
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    for delay in range(12):
        for fail in ("settings", "key"):
            gateway.transport = ScriptedTransport()
            remote_access = gateway.remote_access()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remote_access.run)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                if fail == "settings":
                    with failing_once("replace"), contextlib.suppress(StorageError):
                        await remote_access.apply(SettingsUpdate(server=f"wss://{delay}.test", key=OTHER_KEY))
                else:
                    gateway.keystore.failing.add("delete")
                    with pytest.raises(StorageError):
                        await remote_access.apply(SettingsUpdate(enabled=False, clear_key=True))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
                assert [attempt.target.key for attempt in gateway.transport.attempts] == [KEY]
                assert State.DISABLED not in states_of(remote_access.history)[1:]
                nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_key_that_is_taken_back_while_run_reads_it_is_not_used(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.store("enabled = true")
    await gateway.keystore.put(DEFAULT_SECRET_REF, KEY)
    failing = gateway.keystore.hold_get = trio.Event()

    def fail(*_: object, **__: object) -> NoReturn:
        failing.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    remote_access = gateway.remote_access()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(remote_access.run)
        await trio.testing.wait_all_tasks_blocked()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            # The settings are written when the new key is stored already, and right then `run` reads it.
            with pytest.raises(StorageError):
                await remote_access.apply(SettingsUpdate(server="wss://elsewhere.test", key=OTHER_KEY))
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        assert [attempt.target.key for attempt in gateway.transport.attempts] == [KEY]
        nursery.cancel_scope.cancel()
