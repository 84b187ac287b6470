"""Stores that hang: callers that wait for them are answered in bounded time, and what they do later is undone."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn, final

import pytest
import tomlkit
import trio
import trio.testing
from gateway import EPOCH, KEY, OTHER_KEY, Gateway, connected, in_virtual_time, running, shown
from trio.testing import MockClock

from pioneer_tunnel import RpcError
from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._storage import files
from pioneer_tunnel._wire.json_rpc import INTERNAL_ERROR
from pioneer_tunnel.gateway import settings as settings_module
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF, FileKeystore, KeyringKeystore
from pioneer_tunnel.gateway.rpc import RemoteAccessRpc
from pioneer_tunnel.gateway.settings import Settings, SettingsUpdate
from pioneer_tunnel.gateway.settings_and_key import PATIENCE
from pioneer_tunnel.testing import ScriptedTransport
from pioneer_tunnel.transports.interface import Deliver, Report, Session, Target

BOTH: Final = SettingsUpdate(enabled=True, key=OTHER_KEY)


@final
class Keyring:
    """A keyring in memory, as the package `keyring` has them, whose calls hang in a thread until they may go on."""

    def __init__(self) -> None:
        self.passwords: dict[str, str] = {}
        self.hanging: set[str] = set()
        self.go_on = threading.Event()
        self.working = 0

    def get_password(self, service: str, username: str) -> str | None:
        self._hang("get")
        return self.passwords.get(username)

    def set_password(self, service: str, username: str, password: str) -> None:
        self._hang("set")
        self.passwords[username] = password

    def delete_password(self, service: str, username: str) -> None:
        self._hang("delete")
        del self.passwords[username]

    def _hang(self, name: str) -> None:
        if name in self.hanging:
            self.working += 1
            trio.from_thread.run_sync(lambda: None)  # a turn of the loop, in which the clock is looked at
            self.go_on.wait(60)
            self.working -= 1


@final
class JumpsWhileAThreadHangs(trio.abc.Instrument):
    """Lets a clock jump while no thread works, but those that hang."""

    def __init__(self, clock: MockClock, keyring: Keyring) -> None:
        self._clock: Final = clock
        self._keyring: Final = keyring
        self._threads: Final = trio.to_thread.current_default_thread_limiter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        works = self._threads.borrowed_tokens > self._keyring.working
        self._clock.autojump_threshold = math.inf if works else 0


@final
class StubbornKeystore:
    """A host's keystore that cannot be cancelled: Trio waits for its threads."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring: Final = keyring

    async def get(self, reference: str) -> RelayKey | None:
        password = await trio.to_thread.run_sync(self._keyring.get_password, "", reference)
        return None if password is None else RelayKey(password)

    async def put(self, reference: str, key: RelayKey) -> None:
        await trio.to_thread.run_sync(self._keyring.set_password, "", reference, key.reveal())

    async def delete(self, reference: str) -> None:
        await trio.to_thread.run_sync(self._keyring.delete_password, "", reference)

    async def exists(self, reference: str) -> bool:
        return await self.get(reference) is not None


@pytest.fixture
def keyring() -> Iterator[Keyring]:
    """A keyring of which no thread is left behind."""
    keyring = Keyring()
    keyring.passwords[DEFAULT_SECRET_REF] = KEY.reveal()
    yield keyring
    keyring.go_on.set()


@pytest.fixture
def clock() -> MockClock:
    """Virtual time, which passes while the keyring hangs."""
    return MockClock()


@pytest.fixture(params=["ours", "a host's"])
def gateway(request: pytest.FixtureRequest, keyring: Keyring, tmp_path: Path) -> Gateway:
    """A gateway whose keystore may hang, ours or one that cannot be cancelled."""
    ours = request.param == "ours"
    return Gateway(tmp_path, keystore=KeyringKeystore(backend=keyring) if ours else StubbornKeystore(keyring))


@contextmanager
def hanging(keyring: Keyring, *names: str) -> Iterator[None]:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    instrument = JumpsWhileAThreadHangs(clock, keyring)
    trio.lowlevel.add_instrument(instrument)
    keyring.hanging = set(names)
    try:
        yield
    finally:
        keyring.hanging = set()
        keyring.go_on.set()
        trio.lowlevel.remove_instrument(instrument)
        clock.autojump_threshold = math.inf


async def until_idle(keyring: Keyring) -> None:
    """Let the keyring go on, and wait until all threads have ended and what follows from that is done."""
    keyring.go_on.set()
    threads = trio.to_thread.current_default_thread_limiter()
    while True:
        await trio.testing.wait_all_tasks_blocked()
        if not threads.borrowed_tokens:
            return


@pytest.mark.parametrize("step", ["get", "set"])
async def test_an_update_that_hangs_is_given_up_and_undone_when_it_ends(
    gateway: Gateway, keyring: Keyring, step: str, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    remote_access = gateway.remote_access()
    with hanging(keyring, step):
        with pytest.raises(StorageError, match=r"relay key .*has not ended within 20 s; it cannot be rolled back"):
            await remote_access.apply(BOTH)
        assert trio.current_time() == PATIENCE
        assert keyring.working == 1
        assert gateway.stored() == Settings()
        # Nothing may overtake what hangs.
        with pytest.raises(StorageError, match="has not finished an earlier update"):
            await remote_access.apply(SettingsUpdate(key=KEY))
        # What is not about the key goes on.
        await remote_access.apply(SettingsUpdate(server="wss://elsewhere.test"))
        keyring.hanging = set()
        await until_idle(keyring)
    assert keyring.passwords == {DEFAULT_SECRET_REF: KEY.reveal()}
    assert gateway.stored() == Settings(server="wss://elsewhere.test")
    assert "an update was given up" in caplog.text
    assert "has been undone" in caplog.text
    await remote_access.apply(BOTH)
    assert keyring.passwords == {DEFAULT_SECRET_REF: OTHER_KEY.reveal()}


async def test_a_deletion_that_hangs_puts_everything_back(
    gateway: Gateway, keyring: Keyring, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.store()
    remote_access = gateway.remote_access()
    with hanging(keyring, "delete"):
        with pytest.raises(StorageError, match="deleting the relay key"):
            await remote_access.apply(SettingsUpdate(enabled=False, clear_key=True))
        await until_idle(keyring)
    assert keyring.passwords == {DEFAULT_SECRET_REF: KEY.reveal()}
    assert gateway.stored() == Settings(enabled=True)


async def test_an_undoing_that_fails_is_reported(
    gateway: Gateway, keyring: Keyring, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    remote_access = gateway.remote_access()

    def fail(service: str, username: str, password: str) -> None:
        raise OSError("no")

    with hanging(keyring, "set"), pytest.raises(StorageError):
        await remote_access.apply(BOTH)
    keyring.set_password = fail  # type: ignore[method-assign]
    await until_idle(keyring)
    assert keyring.passwords == {DEFAULT_SECRET_REF: OTHER_KEY.reveal()}
    assert "nor could the relay key be put back" in caplog.text


async def test_an_update_that_hangs_can_be_cancelled(gateway: Gateway, keyring: Keyring, clock: MockClock) -> None:
    remote_access = gateway.remote_access()
    with hanging(keyring, "set"):
        with trio.move_on_after(3) as scope:
            await remote_access.apply(BOTH)
        assert scope.cancelled_caught
        assert trio.current_time() == 8
        await until_idle(keyring)
    assert keyring.passwords == {DEFAULT_SECRET_REF: KEY.reveal()}
    assert gateway.stored() == Settings()


async def test_a_keystore_that_hangs_does_not_keep_remote_access_on(
    gateway: Gateway, keyring: Keyring, clock: MockClock
) -> None:
    gateway.store()
    remote_access = gateway.remote_access()
    async with running(remote_access):
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        with hanging(keyring, "get", "set", "delete"):
            await remote_access.apply(SettingsUpdate(enabled=False))
            await remote_access.settled()
            assert shown(remote_access) == (State.DISABLED, None)
            assert trio.current_time() < PATIENCE


async def test_run_reports_a_keystore_that_hangs_and_comes_up_when_it_answers(
    gateway: Gateway, keyring: Keyring, clock: MockClock
) -> None:
    gateway.store()
    remote_access = gateway.remote_access()
    with hanging(keyring, "get"):
        async with running(remote_access):
            assert trio.current_time() == PATIENCE
            assert shown(remote_access) == (State.FAILED, ErrorKind.UNKNOWN)
            assert remote_access.status.retry_at_unix is not None
            await trio.sleep(1000)
            assert keyring.working == 1, "it is asked once"
            await until_idle(keyring)
            await trio.sleep(60)
            assert shown(remote_access) == (State.CONNECTED, None)


async def test_settings_get_ends_when_the_keystore_hangs(gateway: Gateway, keyring: Keyring, clock: MockClock) -> None:
    rpc = RemoteAccessRpc(gateway.remote_access())
    with hanging(keyring, "get"):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask_in_vain, rpc)
        assert trio.current_time() == PATIENCE
        assert keyring.working <= 4, "threads are not used up"
        await until_idle(keyring)
    assert (await rpc.handle("settings/get"))["settings"]["remote_access"]["has_key"]


async def ask_in_vain(rpc: RemoteAccessRpc) -> None:
    with pytest.raises(RpcError, match="has not answered within 20 s") as raised:
        await rpc.handle("settings/get")
    assert raised.value.code == INTERNAL_ERROR


async def test_settings_get_ends_when_the_key_provider_hangs(
    tmp_path: Path, keyring: Keyring, clock: MockClock
) -> None:
    async def key_provider() -> RelayKey:
        await trio.to_thread.run_sync(keyring.get_password, "", "")
        return KEY

    remote_access = Gateway(tmp_path).remote_access(key_provider=key_provider)
    with hanging(keyring, "get"):
        with pytest.raises(StorageError, match="the key provider has not answered"):
            await remote_access.snapshot()
        assert trio.current_time() == PATIENCE
        with trio.move_on_after(1) as scope:
            await remote_access.snapshot()
        assert scope.cancelled_caught
        await until_idle(keyring)
    assert (await remote_access.snapshot()).has_key


PROGRAM: Final = """
import sys, threading
from pathlib import Path
import tomlkit
import trio
from pioneer_tunnel import KeyringKeystore, RelayKey, RemoteAccess, RemoteAccessConfig, SettingsFile, SettingsUpdate

class Hanging:
    def get_password(self, service, username):
        print("hangs", flush=True)
        threading.Event().wait()
    set_password = delete_password = get_password

async def main():
    remote_access = RemoteAccess(
        RemoteAccessConfig(relay_addr="wss://relay.test", base_dir=Path(sys.argv[1])),
        settings=SettingsFile(Path(sys.argv[1]) / "s.toml"),
        keystore=KeyringKeystore(backend=Hanging()),
    )
    await remote_access.apply(SettingsUpdate(enabled=True, key=RelayKey("ptk1_a-key-of-a-test-0123456789")))

trio.run(main)
"""


def test_ctrl_c_ends_a_process_whose_keystore_hangs(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"hangs\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != -signal.SIGKILL
    assert b"KeyboardInterrupt" in said


def keys_in_memory(text: str) -> list[Any]:
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, RelayKey) and item.reveal() == text]


async def serve(target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]) -> NoReturn:
    task_status.started(Session())
    await trio.sleep_forever()
    raise AssertionError


@in_virtual_time
async def test_after_run_no_key_is_left_and_retry_now_does_nothing(tmp_path: Path) -> None:
    text = "ptk1_a-key-that-is-nowhere-else-0123456789"
    gateway = Gateway(tmp_path)

    async def key_provider() -> RelayKey:
        await trio.lowlevel.checkpoint()
        return RelayKey(text)

    gateway.store()
    remote_access = gateway.remote_access(key_provider=key_provider, transports={"websocket": serve})
    async with running(remote_access):
        await remote_access.settled()
        assert shown(remote_access) == (State.CONNECTED, None)
        assert keys_in_memory(text)
    assert keys_in_memory(text) == []
    history = remote_access.history
    remote_access.retry_now()
    await trio.sleep(3600)
    assert remote_access.history == history


@in_virtual_time
async def test_what_apply_handed_over_is_dropped_too(tmp_path: Path) -> None:
    text = "ptk1_another-key-that-is-nowhere-else-0123456789"
    gateway = Gateway(tmp_path)
    remote_access = gateway.remote_access(transports={"websocket": serve})
    async with connected(remote_access):
        await remote_access.apply(SettingsUpdate(key=RelayKey(text)))
    await gateway.keystore.delete(DEFAULT_SECRET_REF)
    assert keys_in_memory(text) == []
    await remote_access.apply(SettingsUpdate(key=RelayKey(text)))
    await gateway.keystore.delete(DEFAULT_SECRET_REF)
    await trio.testing.wait_all_tasks_blocked()  # the task that has written is over as well
    assert keys_in_memory(text) == []


@in_virtual_time
async def test_the_key_is_dropped_when_the_generation_ends(tmp_path: Path) -> None:
    text = "ptk1_a-third-key-that-is-nowhere-else-0123456789"
    gateway = Gateway(tmp_path)
    remote_access = gateway.remote_access(transports={"websocket": serve})
    async with running(remote_access):
        await remote_access.apply(SettingsUpdate(enabled=True, key=RelayKey(text)))
        await remote_access.settled()
        assert keys_in_memory(text)
        await remote_access.apply(SettingsUpdate(enabled=False, clear_key=True))
        await remote_access.settled()
        assert keys_in_memory(text) == []


# What an update costs


@final
class Costs:
    """Counts threads, reads and parses of the settings file, and fsyncs."""

    def __init__(self) -> None:
        self.threads = self.reads = self.parses = self.fsyncs = 0

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "reads" or str(args[0]).endswith("gateway-settings.toml"):
                setattr(self, name, getattr(self, name) + 1)
            return real(*args, **kwargs)

        return call


@contextmanager
def counting() -> Iterator[Costs]:
    costs = Costs()
    with pytest.MonkeyPatch.context() as patch:
        for place, name, what in (
            (trio.to_thread, "run_sync", "threads"),
            (files, "read", "reads"),
            (tomllib, "loads", "parses"),
            (tomlkit, "parse", "parses"),
            (os, "fsync", "fsyncs"),
        ):
            patch.setattr(place, name, costs.counted(what, getattr(place, name)))
        yield costs


async def test_an_update_costs_few_threads_reads_and_fsyncs(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, keystore=FileKeystore(tmp_path / "keystore"))
    remote_access = gateway.remote_access({"allow_server_override": True})
    rpc = RemoteAccessRpc(remote_access)
    # fields, most threads, most fsyncs: two for each file that is written, the file's and its folder's
    updates: list[tuple[dict[str, Any], int, int]] = [
        ({"enabled": True, "key": KEY.reveal()}, 4, 4),
        ({"key": OTHER_KEY.reveal()}, 3, 2),
        ({"enabled": False}, 3, 2),
        ({"enabled": True}, 3, 2),
        ({"server": "wss://elsewhere.test"}, 3, 2),
        ({"enabled": True}, 2, 0),
        ({"clear_key": True}, 3, 1),
    ]
    async with running(remote_access):
        # The first update makes the keystore's master key.
        await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
        await remote_access.settled()
        await remote_access.apply(SettingsUpdate(enabled=False, clear_key=True))
        await remote_access.settled()
        for fields, threads, fsyncs in updates:
            with counting() as costs:
                await rpc.handle("settings/update", {"update": {"remote_access": fields}})
                await remote_access.settled()
            assert costs.threads <= threads, fields
            assert costs.fsyncs <= fsyncs, fields
            # The file was written a moment ago, so its times cannot tell yet whether it has changed since.
            assert costs.reads <= (4 if threads > 2 else 1), fields
            assert costs.parses <= 5, fields


async def test_a_file_is_read_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_SETTLED_SECONDS", 0)
    gateway = Gateway(tmp_path, keystore=FileKeystore(tmp_path / "keystore"))
    gateway.store("enabled = true\nserver = 'wss://one.test'")
    remote_access = gateway.remote_access({"allow_server_override": True})
    async with running(remote_access):
        with counting() as costs:
            for _ in range(3):
                assert (await remote_access.snapshot()).server == "wss://one.test"
        assert costs.reads == 0
        # An operator's edit is taken up, also one that keeps the size and the time of the last change.
        before = gateway.settings_path.stat()
        gateway.store("enabled = true\nserver = 'wss://two.test'")
        os.utime(gateway.settings_path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with counting() as costs:
            assert (await remote_access.snapshot()).server == "wss://two.test"
            await remote_access.apply(SettingsUpdate(key=KEY))
            await remote_access.settled()
        assert costs.reads == 1
        assert gateway.transport.attempts[-1].target.address.host == "two.test"


async def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """Within one tick of the file system's clock, its times do not tell."""
    gateway = Gateway(tmp_path)
    remote_access = gateway.remote_access({"allow_server_override": True})
    for number in range(20):
        gateway.store(f"server = 'wss://{number % 10}.test'")
        assert (await remote_access.snapshot()).server == f"wss://{number % 10}.test"


@in_virtual_time
async def test_the_reply_has_the_status_that_the_update_leads_to(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, transport=ScriptedTransport(goodbye=3))
    remote_access = gateway.remote_access({"allow_server_override": True})
    rpc = RemoteAccessRpc(remote_access)

    async def reply(**fields: Any) -> tuple[str, str | None]:
        result = await rpc.handle("settings/update", {"update": {"remote_access": fields}})
        status = result["settings"]["remote_access"]["status"]
        assert status["updated_at_unix"] == EPOCH + trio.current_time()
        return status["state"], status.get("error_kind")

    assert await reply(key=KEY.reveal()) == ("disabled", None)
    async with running(remote_access):
        for fields, expected in (
            ({"enabled": True}, ("starting", None)),
            ({"enabled": False}, ("disabled", None)),
            ({"enabled": True}, ("starting", None)),
            ({"clear_key": True}, ("failed", "missing_key")),
            ({"enabled": False}, ("disabled", None)),
            ({"enabled": True, "key": OTHER_KEY.reveal()}, ("starting", None)),
            ({"key": KEY.reveal()}, ("starting", None)),
        ):
            assert await reply(**fields) == expected, fields
            told = len(remote_access.history)
            await remote_access.settled()
            first = remote_access.history[told:][0] if len(remote_access.history) > told else remote_access.status
            assert (first.state, first.error_kind) == expected or first.state is State.CONNECTED, fields
            await trio.sleep(10)
        # Nothing changes: the status of the live generation.
        result = await rpc.handle("settings/update", {"update": {"remote_access": {"enabled": True}}})
        assert result["settings"]["remote_access"]["status"]["state"] == "connected"
        # What is stored cannot be used.
        gateway.keystore.failing.add("get")
        await reply(enabled=False)
        await remote_access.settled()
        gateway.keystore.failing.add("get")
        assert await reply(enabled=True) == ("failed", "io")


@in_virtual_time
async def test_the_reply_of_a_host_that_keeps_its_key_elsewhere_promises_nothing(tmp_path: Path) -> None:
    async def key_provider() -> RelayKey:
        await trio.lowlevel.checkpoint()
        return KEY

    gateway = Gateway(tmp_path, transport=ScriptedTransport(goodbye=3))
    remote_access = gateway.remote_access(key_provider=key_provider)
    rpc = RemoteAccessRpc(remote_access)
    async with running(remote_access):
        for enabled, states in ((True, {"disabled", "starting"}), (False, {"disabled"})):
            result = await rpc.handle("settings/update", {"update": {"remote_access": {"enabled": enabled}}})
            assert result["settings"]["remote_access"]["status"]["state"] in states
            await remote_access.settled()
