"""`pioneer_tunnel.blocking`: a tunnel for threads starts, stops, waits and is interrupted as their own work is."""

from __future__ import annotations

import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from gateway import Gateway
from relay_thread import local_echo, running_relay
from rig import AT_ONCE, HANG, KEY, RELAY_NAME, RelayRig, free_port, open_sockets, request, wait_until

from pioneer_tunnel import (
    Certificate,
    InvalidSettingsError,
    MemoryKeystore,
    RelayKey,
    RpcError,
    SettingsFile,
    SettingsUpdate,
    State,
    Status,
    TunnelAuthError,
    new_relay_key,
)
from pioneer_tunnel.blocking import RemoteAccess, RemoteAccessRpc, Tunnel, open_tunnel

URL: Final = f"ws://{RELAY_NAME}"


@pytest.fixture(scope="module")
def control() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(autouse=True)
def nothing_left(relay_in_thread: RelayRig, control: str) -> Iterator[None]:
    sockets = open_sockets()
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pioneer-tunnel")]
    wait_until(lambda: open_sockets() <= sockets)  # the relay is a thread of this process, and has its ends of them


def ask(relay: RelayRig, text: bytes = b"hello") -> bytes:
    with socket.create_connection(("127.0.0.1", relay.addresses.tunnels["office"].port)) as visitor:
        visitor.sendall(text)
        visitor.shutdown(socket.SHUT_WR)
        return b"".join(iter(partial(visitor.recv, 1000), b""))


def opened(relay: RelayRig, forward_to: str | None = None, **changes: Any) -> Tunnel:
    options: dict[str, Any] = {"key": KEY, "dial": relay.dial, "restart": AT_ONCE}
    return open_tunnel(URL, forward_to=forward_to, **(options | changes))


async def refused(host: str, port: int) -> trio.abc.Stream:
    raise ConnectionRefusedError


def test_visitors_are_forwarded_to_a_local_server(relay_in_thread: RelayRig) -> None:
    with local_echo() as local, opened(relay_in_thread, local) as tunnel:
        assert tunnel.wait_connected(timeout=HANG).state is State.CONNECTED
        assert tunnel.public_url == "http://office.test"
        assert ask(relay_in_thread) == b"hello"
        tunnel.retry_now()
    assert tunnel.status.state is State.STOPPED
    assert tunnel.history[-1] == tunnel.status
    assert tunnel.history_dropped == 0
    assert "stopped" in repr(tunnel)
    tunnel.close()
    tunnel.retry_now()
    with pytest.raises(RuntimeError, match="stopped"):
        tunnel.wait_connected()


def test_the_local_server_gets_request_ids(relay_in_thread: RelayRig) -> None:
    with local_echo() as local, opened(relay_in_thread, local, request_id="set") as tunnel:
        tunnel.wait_connected(timeout=HANG)
        assert b"\r\nX-Request-ID: " in ask(relay_in_thread, request())


def test_visitors_with_tls_are_forwarded_without_it(relay_in_thread: RelayRig, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("office.test")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with local_echo() as local, opened(relay_in_thread, local, certificate=certificate) as tunnel:
        tunnel.wait_connected(timeout=HANG)
        with (
            socket.create_connection(("127.0.0.1", relay_in_thread.addresses.tunnels["office"].port)) as plain,
            context.wrap_socket(plain, server_hostname="office.test") as visitor,
        ):
            visitor.sendall(b"hello")
            assert visitor.recv(100) == b"hello"


def test_statuses_come_to_a_queue_a_callback_and_a_loop(relay_in_thread: RelayRig) -> None:
    statuses: queue.SimpleQueue[Status] = queue.SimpleQueue()
    with opened(relay_in_thread, on_status=statuses.put) as tunnel:
        for status in tunnel.watch():
            if status.state is State.CONNECTED:
                break
        rest = tunnel.watch()
    states = [status.state for status in rest]
    assert states[-1:] == [State.STOPPED]
    seen = []
    while not statuses.empty():
        seen.append(statuses.get().state)
    assert seen[-1] is State.STOPPED
    assert State.CONNECTED in seen


def test_a_callback_that_raises_gets_the_next_status_all_the_same(
    relay_in_thread: RelayRig, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[State] = []

    def note(status: Status) -> None:
        seen.append(status.state)
        raise ZeroDivisionError

    with opened(relay_in_thread, on_status=note) as tunnel:
        tunnel.wait_connected(timeout=HANG)
    assert seen[-1] is State.STOPPED
    assert "on_status has failed" in caplog.text


def test_a_callback_may_close_the_tunnel(relay_in_thread: RelayRig) -> None:
    def note(status: Status) -> None:
        if status.state is State.CONNECTED:
            tunnels[0].close()
            closed.set()

    closed = threading.Event()
    tunnels: list[Tunnel] = []
    ready = threading.Event()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.to_thread.run_sync(ready.wait)
        return await relay_in_thread.dial(host, port)

    tunnels.append(opened(relay_in_thread, on_status=note, dial=dial))
    ready.set()
    assert closed.wait(HANG)
    tunnels[0].close()


def test_what_cannot_be_used_comes_out_of_open_tunnel(relay_in_thread: RelayRig) -> None:
    with pytest.raises(InvalidSettingsError, match="nonsense"):
        open_tunnel("nonsense", key=KEY, forward_to=None)
    with pytest.raises(InvalidSettingsError, match=r"local: .*nonsense"):
        opened(relay_in_thread, "nonsense")


def test_a_wait_may_time_out_and_the_tunnel_goes_on(relay_in_thread: RelayRig) -> None:
    with opened(relay_in_thread, dial=refused) as tunnel:
        with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
            tunnel.wait_connected(timeout=0.05)
        assert tunnel.status.state is State.FAILED
        assert tunnel.status.retry_at_unix is not None


def test_a_final_failure_is_raised_where_it_is_waited_for(relay_in_thread: RelayRig) -> None:
    with opened(relay_in_thread, "127.0.0.1:1", key=new_relay_key()) as tunnel:
        for _ in range(2):
            with pytest.raises(TunnelAuthError):
                tunnel.wait_connected(timeout=HANG)


def test_a_bug_in_the_tunnels_own_task_comes_out_at_the_end(relay_in_thread: RelayRig) -> None:
    class Random:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError("a bug")

    ready = threading.Event()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.to_thread.run_sync(ready.wait)
        raise ConnectionRefusedError

    tunnel = opened(relay_in_thread, dial=dial, random=Random())
    ready.set()
    states = [status.state for status in tunnel.watch()]
    assert states[-1] is State.STOPPED
    with pytest.raises(ZeroDivisionError, match="a bug"):
        tunnel.close()


def test_the_tunnels_own_thread_cannot_wait_for_itself(relay_in_thread: RelayRig) -> None:
    errors: list[str] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        ready.wait()
        for method in (tunnels[0].wait_connected, tunnels[0].close):
            try:
                method()
            except RuntimeError as error:
                errors.append(str(error))
        return await relay_in_thread.dial(host, port)

    ready = threading.Event()
    tunnels = [opened(relay_in_thread, dial=dial)]
    ready.set()
    with tunnels[0] as tunnel:
        tunnel.wait_connected(timeout=HANG)
    assert ["own thread" in error for error in errors] == [True, True]


# Processes that end in every way

PROGRAM: Final = """
import os, signal, sys, threading, time, warnings
from pioneer_tunnel import RelayKey
from pioneer_tunnel.blocking import open_tunnel

relay, key, way = sys.argv[1:]
tunnel = open_tunnel(relay, key=RelayKey(key), forward_to=None)
print(tunnel.wait_connected(timeout=60).state, flush=True)
match way:
    case "forgotten":
        sys.exit(0)
    case "raises":
        raise KeyError("why")
    case "interrupted":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            with tunnel:
                for status in tunnel.watch():
                    pass
        except KeyboardInterrupt:
            print(tunnel.status.state)
    case "forked":
        with warnings.catch_warnings():  # Python 3.12 and later ones warn of a fork beside threads
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                tunnel.wait_connected()
            except RuntimeError as error:
                print(error, flush=True)
            sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), tunnel.wait_connected().state)
        tunnel.close()
"""


@pytest.mark.parametrize(
    ("way", "code", "says", "complains"),
    [
        pytest.param("forgotten", 0, ["connected"], "", marks=pytest.mark.slow),
        pytest.param("raises", 1, ["connected"], "KeyError", marks=pytest.mark.slow),
        ("interrupted", 0, ["connected", "stopped"], ""),
        (
            "forked",
            0,
            ["connected", "it was started in another process, before a fork; start it after the fork", "3 connected"],
            "",
        ),
    ],
)
def test_a_process_ends_in_good_order_however_it_ends(
    *, way: str, code: int, says: list[str], complains: str, tmp_path: Path, control: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with running_relay(control_addr=control, public_names=[control]) as relay:
        done = subprocess.run(
            [sys.executable, "-W", "error", program, f"ws://{control}", KEY.reveal(), way],
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert relay.relay is not None
    assert (done.returncode, done.stdout.splitlines()) == (code, says), done.stderr
    assert complains in done.stderr
    assert bool(done.stderr) == bool(complains)


def test_a_tunnel_is_drained(relay_in_thread: RelayRig) -> None:
    with local_echo() as local, opened(relay_in_thread, local) as tunnel:
        tunnel.wait_connected(timeout=HANG)
        with socket.create_connection(("127.0.0.1", relay_in_thread.addresses.tunnels["office"].port)) as visitor:
            visitor.sendall(b"hello")
            assert visitor.recv(100) == b"hello"
            assert (tunnel.stats().streams.open, tunnel.stats().streams.from_visitors_bytes_total) == (1, 5)
            draining = threading.Thread(target=tunnel.drain, args=(HANG,))
            draining.start()
            visitor.sendall(b"again")
            assert visitor.recv(100) == b"again"
            visitor.shutdown(socket.SHUT_WR)
            assert visitor.recv(100) == b""
            draining.join(HANG)
        assert tunnel.status.state is State.STOPPED
        tunnel.drain()


# Remote access


def remote_access(relay: RelayRig, folder: Path, **changes: Any) -> RemoteAccess:
    return RemoteAccess(
        Gateway(folder).config(relay_addr=URL, restart_initial_ms=10),
        settings=SettingsFile(folder / "settings.toml"),
        keystore=MemoryKeystore(),
        dial=relay.dial,
        **changes,
    )


def state(remote: RemoteAccess) -> State:
    return remote.status.state


def test_remote_access_is_started_applied_to_and_stopped(relay_in_thread: RelayRig, tmp_path: Path) -> None:
    statuses: queue.SimpleQueue[Status] = queue.SimpleQueue()
    remote = remote_access(relay_in_thread, tmp_path, on_status=statuses.put)
    assert state(remote) is State.DISABLED
    for call in (remote.settled, remote.has_key, remote.watch, partial(remote.apply, SettingsUpdate(enabled=True))):
        with pytest.raises(RuntimeError, match="not running"):
            call()
    remote.stop()
    remote.retry_now()
    remote.start()
    with pytest.raises(RuntimeError, match="running already"):
        remote.start()
    remote.apply(SettingsUpdate(enabled=True, key=KEY))
    remote.settled(timeout=HANG)
    assert state(remote) is State.CONNECTED
    assert remote.has_key()
    assert remote.settings().enabled
    assert remote.snapshot().enabled
    assert remote.stats().since_unix > 0
    remote.retry_now()
    remote.configure(Gateway(tmp_path).config(relay_addr=URL, restart_initial_ms=11))
    assert remote.config.restart_initial_ms == 11
    assert next(remote.watch()) in remote.history
    remote.stop()
    assert state(remote) is State.STOPPED
    assert remote.history_dropped == 0
    with remote:
        remote.settled(timeout=HANG)
        assert state(remote) is State.CONNECTED
    seen = []
    while not statuses.empty():
        seen.append(statuses.get().state)
    assert seen.count(State.STOPPED) == 2


def test_the_access_log_of_remote_access_is_reopened(relay_in_thread: RelayRig, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    remote = remote_access(relay_in_thread, tmp_path)
    remote.reopen_access_log()
    remote.start()
    remote.configure(Gateway(tmp_path).config(relay_addr=URL, restart_initial_ms=10, access_log=log))
    remote.apply(SettingsUpdate(enabled=True, key=KEY))
    remote.settled(timeout=HANG)
    log.rename(tmp_path / "access.log.1")
    remote.reopen_access_log()
    wait_until(log.exists)
    remote.stop()


def test_remote_access_raises_the_errors_of_its_trio_face(relay_in_thread: RelayRig, tmp_path: Path) -> None:
    with remote_access(relay_in_thread, tmp_path) as remote, pytest.raises(InvalidSettingsError, match="public half"):
        remote.apply(SettingsUpdate(key=RelayKey(str(KEY.identity().public_key))))


def test_remote_access_answers_json_rpc_and_no_traceback_shows_the_key(
    relay_in_thread: RelayRig, tmp_path: Path
) -> None:
    with remote_access(relay_in_thread, tmp_path) as remote:
        rpc = RemoteAccessRpc(remote, other_sections=lambda: {"gateway": True})
        answer = rpc.handle("settings/update", {"update": {"remote_access": {"enabled": True, "key": KEY.reveal()}}})
        assert answer["settings"]["gateway"] is True
        assert answer["settings"]["remote_access"]["has_key"] is True
        with pytest.raises(RpcError) as refused:
            rpc.handle("settings/update", {"update": {"remote_access": {"key": KEY.reveal() + "\0"}}})
    found = traceback.TracebackException.from_exception(refused.value, capture_locals=True)
    ours = [frame for frame in found.stack if "/pioneer_tunnel/" in frame.filename]
    assert len(ours) > 3
    assert not [frame for frame in ours if KEY.reveal() in str(frame.locals)]
