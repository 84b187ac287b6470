"""`pioneer_tunnel.aio`: under asyncio, results, errors and cancellation are as exact as under Trio."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import uvloop
from gateway import Gateway
from rig import (
    AT_ONCE,
    HANG,
    KEY,
    RELAY_NAME,
    RelayRig,
    connect,
    free_port,
    no_hang,
    open_sockets,
    relay_config,
    request,
    wait_until,
)
from shared_relay import running_relay

import pioneer_tunnel
from pioneer_tunnel import (
    InvalidSettingsError,
    MemoryKeystore,
    RelayConnectError,
    RestartPolicy,
    RpcError,
    SettingsFile,
    SettingsUpdate,
    State,
    TunnelAuthError,
    asgi,
    new_relay_key,
)
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.aio import RemoteAccess, RemoteAccessRpc, open_tunnel, serve
from pioneer_tunnel.gateway.rpc import STATUS_CHANGED
from pioneer_tunnel.relay import Relay

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayRig]:
    with running_relay() as rig:
        yield rig


@pytest.fixture(scope="module")
def control() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs a coroutine as a host does, on each kind of loop, in debug mode; nothing may be left behind."""
    sockets = open_sockets()

    def run(main: Any) -> Any:
        with asyncio.Runner(debug=True, loop_factory=LOOPS[request.param]) as runner:
            return runner.run(_bounded(main))

    yield run
    assert not [thread for thread in threading.enumerate() if thread.name == "pioneer-tunnel"]
    wait_until(lambda: open_sockets() <= sockets)  # the relay is a thread of this process, and has its ends of them


async def _bounded(main: Awaitable[Any]) -> Any:
    async with asyncio.timeout(60):
        return await main


def options(relay: RelayRig, **changes: Any) -> dict[str, Any]:
    return {"key": KEY, "dial": relay.dial, "restart": AT_ONCE, **changes}


URL: Final = f"ws://{RELAY_NAME}"


async def ask(relay: RelayRig, text: bytes = b"hello") -> bytes:
    """Visit, and read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.addresses.tunnels["office"].port)
    try:
        writer.write(text)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def local_server() -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def forwarded(relay: RelayRig) -> bytes:
    async with local_server() as local, open_tunnel(URL, **options(relay), forward_to=local) as tunnel:
        assert (await tunnel.wait_connected()).state is State.CONNECTED
        assert tunnel.public_url == "http://office.test"
        return await ask(relay)


def test_visitors_are_forwarded_to_a_local_server(relay: RelayRig, run: Any) -> None:
    assert run(forwarded(relay)) == b"hello"


def test_the_local_server_gets_request_ids(relay: RelayRig, run: Any) -> None:
    async def main() -> bytes:
        options_ = options(relay, request_id="set")
        async with local_server() as local, open_tunnel(URL, **options_, forward_to=local) as tunnel:
            await tunnel.wait_connected()
            return await ask(relay, request())

    assert b"\r\nX-Request-ID: " in run(main())


def test_the_statuses_end_after_stopped(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        seen: list[State] = []

        async def watch(statuses: AsyncIterator[Any]) -> None:
            seen.extend([status.state async for status in statuses])

        async with asyncio.TaskGroup() as tasks, open_tunnel(URL, **options(relay)) as tunnel:
            tasks.create_task(watch(tunnel.watch()))
            await tunnel.wait_connected()
            await asyncio.sleep(0)
        assert seen[-1] is State.STOPPED
        assert [status.state for status in tunnel.history][-1] is State.STOPPED
        assert tunnel.status.state is State.STOPPED
        assert tunnel.history_dropped == 0
        late = tunnel.watch()
        assert (await anext(late)).state is State.STOPPED
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(late)
        with pytest.raises(RuntimeError, match="stopped"):
            await tunnel.wait_connected()
        tunnel.retry_now()

    run(main())


def test_a_watcher_that_is_cancelled_misses_nothing(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay)) as tunnel:
            await tunnel.wait_connected()
            statuses = tunnel.watch()
            seen = [await anext(statuses)]
            for _ in range(20):
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.001):
                        seen.append(await anext(statuses))
            last = seen[-1]
            assert (last.state, last.public_url) == (tunnel.status.state, tunnel.status.public_url)

    run(main())


def test_an_exception_of_the_block_comes_out_as_it_is(relay: RelayRig, run: Any) -> None:
    group = ExceptionGroup("of the host", [KeyError("a"), ValueError("b")])

    async def main(error: BaseException) -> None:
        async with open_tunnel(URL, **options(relay)) as tunnel:
            await tunnel.wait_connected()
            raise error

    for error in (KeyError("why"), group, ExceptionGroup("one", [KeyError("c")])):
        with pytest.raises(type(error)) as raised:
            run(main(error))
        assert raised.value is error


def test_what_cannot_be_used_comes_out_at_the_door(relay: RelayRig, run: Any) -> None:
    async def main(relay_text: str = URL, **changes: Any) -> None:
        async with open_tunnel(relay_text, **options(relay, **changes)):
            pytest.fail("it was let in")

    with pytest.raises(InvalidSettingsError, match="nonsense"):
        run(main("nonsense"))
    with pytest.raises(InvalidSettingsError, match=r"local: .*'nonsense'"):
        run(main(forward_to="nonsense"))
    with pytest.raises(TypeError, match="not to both"):
        run(main(forward_to="127.0.0.1:1", app=lambda: None))
    with pytest.raises(TypeError, match="RelayKey"):
        run(main(key="a text"))


def test_a_final_failure_is_raised_where_it_is_waited_for(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay, key=new_relay_key()), forward_to="127.0.0.1:1") as tunnel:
            for _ in range(2):
                with pytest.raises(TunnelAuthError):
                    await tunnel.wait_connected()
            assert tunnel.status.state is State.FAILED
            await asyncio.sleep(0)  # the block goes on

    run(main())


def test_a_bug_in_the_tunnels_own_task_cancels_the_block_and_comes_out(relay: RelayRig, run: Any) -> None:
    class Random:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError("a bug")

    async def refused(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay, random=Random(), dial=refused, restart=RestartPolicy())):
            await asyncio.sleep(60)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(main())


# Stopping in every way


async def entered(relay: RelayRig, ready: asyncio.Event, ended: list[Any], **changes: Any) -> None:
    async with open_tunnel(URL, **options(relay, **changes)) as tunnel:
        await tunnel.wait_connected()
        ready.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(tunnel)


def test_cancelled_it_leaves_nothing(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        ready, ended = asyncio.Event(), list[Any]()
        task = asyncio.create_task(entered(relay, ready, ended))
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert ended[0].status.state is State.STOPPED

    run(main())


def test_cancelled_again_and_again_it_still_ends_in_good_order(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        ready, ended = asyncio.Event(), list[Any]()
        task = asyncio.create_task(entered(relay, ready, ended))
        await ready.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()
        assert ended[0].status.state is State.STOPPED

    run(main())


def test_cancelled_at_any_moment_of_entering_it_leaves_nothing(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        for turns in range(30):
            task = asyncio.create_task(entered(relay, asyncio.Event(), []))
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_a_timeout_around_it_is_a_timeout(relay: RelayRig, run: Any) -> None:
    async def refused(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay, dial=refused)) as tunnel:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await tunnel.wait_connected()
            current = asyncio.current_task()
            assert current is not None
            assert not current.cancelling()
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), open_tunnel(URL, **options(relay, dial=refused)) as tunnel:
                await tunnel.wait_connected()

    run(main())


def test_a_loop_that_ends_while_it_is_open_ends_it(relay: RelayRig, run: Any) -> None:
    """`asyncio.run` cancels the tasks that are left when the main one has returned."""
    ended: list[Any] = []

    async def main() -> None:
        ready = asyncio.Event()
        main.task = asyncio.create_task(entered(relay, ready, ended))  # type: ignore[attr-defined]
        await ready.wait()

    run(main())
    assert ended[0].status.state is State.STOPPED


@pytest.mark.parametrize("what", ["open_tunnel", "RemoteAccess"])
def test_a_loop_that_is_closed_under_it_ends_its_thread(relay: RelayRig, tmp_path: Path, what: str) -> None:
    loop = asyncio.new_event_loop()
    ready = asyncio.Event()
    ended: list[Any] = []

    async def entered_remote() -> None:
        async with remote_access(relay, tmp_path) as remote:
            ended.append(remote)
            ready.set()
            await asyncio.sleep(60)

    task = loop.create_task(entered(relay, ready, ended) if what == "open_tunnel" else entered_remote())
    loop.run_until_complete(asyncio.wait_for(ready.wait(), 60))
    loop.call_exception_handler = lambda context: None  # type: ignore[method-assign]  # "Task was destroyed …"
    loop.close()
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    del task
    for thread in threading.enumerate():
        if thread.name == "pioneer-tunnel":
            thread.join(60)
            assert not thread.is_alive()
    assert ended[0].status.state is State.STOPPED


def test_a_callback_that_blocks_the_loop_does_not_stop_the_tunnel(relay: RelayRig, run: Any) -> None:
    async def main() -> bytes:
        async with open_tunnel(URL, **options(relay), forward_to=str(relay_echo)) as tunnel:
            await tunnel.wait_connected()
            answers: list[bytes] = []
            visitor = threading.Thread(target=lambda: answers.append(trio.run(visit_blocking, relay)))
            visitor.start()
            visitor.join()  # the loop is blocked meanwhile
            return answers[0]

    with threaded_echo() as relay_echo:
        assert run(main()) == b"hello"


async def visit_blocking(relay: RelayRig) -> bytes:
    with no_hang():
        async with await connect(relay.addresses.tunnels["office"]) as visitor:
            await visitor.send_all(b"hello")
            return bytes(await visitor.receive_some())


@contextmanager
def threaded_echo() -> Iterator[Address]:
    import socketserver

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request.sendall(self.request.recv(100))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Address("127.0.0.1", server.server_address[1])
        server.shutdown()
        thread.join()


def test_the_hosts_context_is_seen_in_its_functions(relay: RelayRig, run: Any) -> None:
    name = contextvars.ContextVar[str]("name")
    seen: list[str] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        seen.append(name.get())
        return await relay.dial(host, port)

    async def main() -> None:
        name.set("of the host")
        async with open_tunnel(URL, **options(relay, dial=dial)) as tunnel:
            await tunnel.wait_connected()

    run(main())
    assert set(seen) == {"of the host"}


PROGRAM: Final = """
import asyncio, os, signal, sys, threading
from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel

relay, key, way = sys.argv[1:]

async def main():
    async with open_tunnel(relay, key=RelayKey(key)) as tunnel:
        try:
            print((await tunnel.wait_connected()).state, flush=True)
            if way == "exits":
                sys.exit(5)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(60)
        finally:
            print("left", flush=True)
    print("not reached")

if way == "forever":
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    try:
        loop.run_forever()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)   # asyncio complains of a task that was never awaited
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("way", "code", "says"),
    [
        ("ctrl-c", -2, ["connected", "left"]),
        pytest.param("exits", 5, ["connected", "left"], marks=pytest.mark.slow),
        ("forever", 0, ["connected", "interrupted", "left"]),
    ],
)
def test_a_process_ends_however_its_loop_ends(
    *, way: str, code: int, says: list[str], tmp_path: Path, control: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with running_relay(control_addr=control, public_names=[control]):
        done = subprocess.run(
            [sys.executable, program, f"ws://{control}", KEY.reveal(), way],
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert (done.returncode, done.stdout.splitlines()) == (code, says), done.stderr
    assert done.stderr.splitlines()[-1:] == (["KeyboardInterrupt"] if way == "ctrl-c" else [])


# Applications


async def hello(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


REQUEST: Final = b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n"


def test_an_application_that_is_running_already_serves_beside_the_block(relay: RelayRig, run: Any) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay), app=hello) as tunnel:
            await tunnel.wait_connected()
            assert (await ask(relay, REQUEST)).endswith(b"hello")

    run(main())


def test_an_application_sees_the_hosts_context(relay: RelayRig, run: Any) -> None:
    name = contextvars.ContextVar[str]("name")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(name.get())
        await hello(scope, receive, send)

    async def main() -> None:
        name.set("of the host")
        async with open_tunnel(URL, **options(relay), app=app) as tunnel:
            await tunnel.wait_connected()
            await ask(relay, REQUEST)

    run(main())
    assert seen == ["of the host"]


def test_serve_raises_why_the_tunnel_has_failed(relay: RelayRig, run: Any) -> None:
    async def main(trigger: Any) -> None:
        async with open_tunnel(URL, **options(relay, key=new_relay_key())) as tunnel:
            await serve(hello, tunnel, lifespan="off", shutdown_trigger=trigger)

    for trigger in (None, lambda: asyncio.sleep(60)):
        with pytest.raises(TunnelAuthError):
            run(main(trigger))


def test_serve_raises_what_the_trigger_raises(relay: RelayRig, run: Any) -> None:
    async def trigger() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay)) as tunnel:
            await serve(hello, tunnel, lifespan="off", shutdown_trigger=trigger)

    with pytest.raises(ZeroDivisionError):
        run(main())


# Remote access


def state(remote: RemoteAccess) -> State:
    return remote.status.state


def remote_access(relay: RelayRig, folder: Path, **changes: Any) -> RemoteAccess:
    keystore = changes.pop("keystore", None) or MemoryKeystore()
    app = changes.pop("app", None)
    return RemoteAccess(
        Gateway(folder).config(relay_addr=URL, restart_initial_ms=10, **changes),
        settings=SettingsFile(folder / "settings.toml"),
        keystore=keystore,
        dial=relay.dial,
        app=app,
    )


def test_the_access_log_of_remote_access_is_reopened(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    log = tmp_path / "access.log"

    async def main() -> None:
        async with remote_access(relay, tmp_path, access_log=log) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            log.rename(tmp_path / "access.log.1")
            remote.reopen_access_log()
            while not log.exists():
                await asyncio.sleep(0.01)

    run(main())


def test_remote_access_is_switched_on_and_off(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay, tmp_path, app=hello) as remote:
            assert state(remote) is State.DISABLED
            assert not await remote.has_key()
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            assert state(remote) is State.CONNECTED
            assert (await remote.snapshot()).has_key
            assert (await remote.stats()).since_unix > 0
            assert (await remote.settings()).enabled
            assert (await ask(relay, REQUEST)).endswith(b"hello")
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

    run(main())


def test_a_tunnel_and_remote_access_stop_in_order(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay)) as tunnel:
            await tunnel.wait_connected()
            assert (await tunnel.stats()).sessions_total == 1
            await tunnel.drain(1.0)
            assert tunnel.status.state is State.STOPPED
            with pytest.raises(RuntimeError, match="closed"):
                await tunnel.wait_connected()
        async with remote_access(relay, tmp_path, app=hello) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            await remote.stop()
            assert state(remote) is State.STOPPED
            assert (await remote.settings()).enabled
            await remote.stop()

    run(main())


def test_a_request_that_outlives_its_generation_hears_that_the_visitor_has_gone(
    relay: RelayRig, run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    async def main() -> None:
        asked, over = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            asked.set()
            heard.append((await receive())["type"])
            over.set()

        async with remote_access(relay, tmp_path, app=app, apply_grace_ms=1) as remote:
            await remote.apply(SettingsUpdate(enabled=True, key=KEY))
            await remote.settled()
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.addresses.tunnels["office"].port)
            writer.write(REQUEST)
            await asked.wait()
            await remote.apply(SettingsUpdate(enabled=False))
            await over.wait()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()

    run(main())
    assert heard == ["http.disconnect"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_remote_access_raises_the_errors_of_its_trio_face(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay, tmp_path) as remote:
            with pytest.raises(InvalidSettingsError, match="public half"):
                await remote.apply(SettingsUpdate(key=pioneer_tunnel.RelayKey(str(KEY.identity().public_key))))

    run(main())


def test_remote_access_answers_json_rpc(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay, tmp_path) as remote:
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

    run(main())


def test_no_traceback_of_a_call_shows_the_key(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    """Also one with the local variables of each frame."""
    import traceback

    wrong = {"update": {"remote_access": {"key": KEY.reveal() + "\0"}}}

    async def main() -> str:
        async with remote_access(relay, tmp_path) as remote:
            try:
                await RemoteAccessRpc(remote).handle("settings/update", wrong)
            except RpcError as error:
                found = traceback.TracebackException.from_exception(error, capture_locals=True)
                ours = [frame for frame in found.stack if "/pioneer_tunnel/" in frame.filename]
                assert len(ours) > 3, ours
                return "\n".join(str(frame.locals) for frame in ours)
        raise AssertionError

    assert KEY.reveal() not in run(main())


def test_an_apply_that_is_cancelled_is_over_when_the_task_is(relay: RelayRig, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with remote_access(relay, tmp_path) as remote:
            for turns in range(10):
                task = asyncio.create_task(remote.apply(SettingsUpdate(server=f"wss://relay-{turns}.test")))
                await asyncio.sleep(turns * 0.001)
                task.cancel()
                await asyncio.wait([task])
                before = await remote.settings()
                await asyncio.sleep(0.01)
                assert await remote.settings() == before

    run(main())


# The wrong library


def test_a_trio_api_under_asyncio_names_the_right_module(tmp_path: Path) -> None:
    async def use(api: Callable[[], Awaitable[Any]]) -> None:
        await api()

    gateway = Gateway(tmp_path).remote_access(wall_clock=time.time)

    async def open_trio() -> None:
        async with pioneer_tunnel.open_tunnel(URL, key=KEY):
            pass

    async def serve_trio() -> None:
        await asgi.serve(hello, None)  # type: ignore[arg-type]

    async def handler_trio() -> None:
        async with asgi.open_handler(hello):
            pass

    async def watch_trio() -> None:
        await anext(gateway.watch())

    for api, instead in (
        (open_trio, "pioneer_tunnel.aio.open_tunnel"),
        (serve_trio, "pioneer_tunnel.aio.serve"),
        (handler_trio, "pioneer_tunnel.aio.serve"),
        (watch_trio, "pioneer_tunnel.aio"),
        (gateway.run, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.settled, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.settings, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.snapshot, "pioneer_tunnel.aio.RemoteAccess"),
        (gateway.has_key, "pioneer_tunnel.aio.RemoteAccess"),
        (partial(gateway.apply, SettingsUpdate(enabled=True)), "pioneer_tunnel.aio.RemoteAccess"),
        (partial(gateway.configure, gateway.config), "pioneer_tunnel.aio.RemoteAccess"),
        (Relay(relay_config()).serve, "a process of its own: pioneer-tunnel relay"),
        (partial(pioneer_tunnel.forward, None, "127.0.0.1:1"), "pioneer_tunnel.aio.open_tunnel"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RuntimeError, match=f"needs Trio, and asyncio is running; under asyncio use {instead}"):
            asyncio.run(use(api))


def test_the_asyncio_face_elsewhere_names_the_right_module(relay: RelayRig, tmp_path: Path) -> None:
    async def enter() -> None:
        async with open_tunnel(URL, key=KEY):
            pass

    async def enter_remote() -> None:
        async with remote_access(relay, tmp_path):
            pass

    for api, instead in ((enter, "pioneer_tunnel.open_tunnel"), (enter_remote, "pioneer_tunnel.RemoteAccess")):
        with pytest.raises(RuntimeError, match=f"needs asyncio, and Trio is running; under Trio use {instead}"):
            trio.run(api)
        coroutine = api()
        with pytest.raises(RuntimeError, match=r"no event loop is running; without one use pioneer_tunnel\.blocking"):
            coroutine.send(None)


def test_relay_connect_errors_are_retried_meanwhile(relay: RelayRig, run: Any) -> None:
    """And what the status says is what the supervisor says."""
    calls: list[int] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionRefusedError
        return await relay.dial(host, port)

    async def main() -> None:
        async with open_tunnel(URL, **options(relay, dial=dial)) as tunnel:
            assert (await tunnel.wait_connected()).state is State.CONNECTED
            assert RelayConnectError.kind in {status.error_kind for status in tunnel.history}

    run(main())
