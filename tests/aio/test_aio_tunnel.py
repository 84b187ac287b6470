"""A tunnel under asyncio: what it carries, its statuses, its errors, and its host's context."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from aio_rig import URL, ask, options
from relay_thread import local_echo
from rig import RelayRig, connect, no_hang, request

from pioneer_tunnel import InvalidSettingsError, RelayConnectError, RestartPolicy, State, TunnelAuthError, new_relay_key
from pioneer_tunnel.aio import open_tunnel


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


def test_visitors_are_forwarded_to_a_local_server(relay_in_thread: RelayRig, on_loop: Any) -> None:
    assert on_loop(forwarded(relay_in_thread)) == b"hello"


def test_the_local_server_gets_request_ids(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> bytes:
        options_ = options(relay_in_thread, request_id="set")
        async with local_server() as local, open_tunnel(URL, **options_, forward_to=local) as tunnel:
            await tunnel.wait_connected()
            return await ask(relay_in_thread, request())

    assert b"\r\nX-Request-ID: " in on_loop(main())


def test_the_statuses_end_after_stopped(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        seen: list[State] = []

        async def watch(statuses: AsyncIterator[Any]) -> None:
            seen.extend([status.state async for status in statuses])

        async with asyncio.TaskGroup() as tasks, open_tunnel(URL, **options(relay_in_thread)) as tunnel:
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

    on_loop(main())


def test_a_watcher_that_is_cancelled_misses_nothing(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread)) as tunnel:
            await tunnel.wait_connected()
            statuses = tunnel.watch()
            seen = [await anext(statuses)]
            for _ in range(20):
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.001):
                        seen.append(await anext(statuses))
            last = seen[-1]
            assert (last.state, last.public_url) == (tunnel.status.state, tunnel.status.public_url)

    on_loop(main())


def test_an_exception_of_the_block_comes_out_as_it_is(relay_in_thread: RelayRig, on_loop: Any) -> None:
    group = ExceptionGroup("of the host", [KeyError("a"), ValueError("b")])

    async def main(error: BaseException) -> None:
        async with open_tunnel(URL, **options(relay_in_thread)) as tunnel:
            await tunnel.wait_connected()
            raise error

    for error in (KeyError("why"), group, ExceptionGroup("one", [KeyError("c")])):
        with pytest.raises(type(error)) as raised:
            on_loop(main(error))
        assert raised.value is error


def test_what_cannot_be_used_comes_out_at_the_door(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main(relay_text: str = URL, **changes: Any) -> None:
        async with open_tunnel(relay_text, **options(relay_in_thread, **changes)):
            pytest.fail("it was let in")

    with pytest.raises(InvalidSettingsError, match="nonsense"):
        on_loop(main("nonsense"))
    with pytest.raises(InvalidSettingsError, match=r"local: .*'nonsense'"):
        on_loop(main(forward_to="nonsense"))
    with pytest.raises(TypeError, match="not to both"):
        on_loop(main(forward_to="127.0.0.1:1", app=lambda: None))
    with pytest.raises(TypeError, match="RelayKey"):
        on_loop(main(key="a text"))


def test_a_final_failure_is_raised_where_it_is_waited_for(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> None:
        async with open_tunnel(
            URL, **options(relay_in_thread, key=new_relay_key()), forward_to="127.0.0.1:1"
        ) as tunnel:
            for _ in range(2):
                with pytest.raises(TunnelAuthError):
                    await tunnel.wait_connected()
            assert tunnel.status.state is State.FAILED
            await asyncio.sleep(0)  # the block goes on

    on_loop(main())


def test_a_bug_in_the_tunnels_own_task_cancels_the_block_and_comes_out(relay_in_thread: RelayRig, on_loop: Any) -> None:
    class Random:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError("a bug")

    async def refused(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError

    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread, random=Random(), dial=refused, restart=RestartPolicy())):
            await asyncio.sleep(60)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        on_loop(main())


def test_a_callback_that_blocks_the_loop_does_not_stop_the_tunnel(relay_in_thread: RelayRig, on_loop: Any) -> None:
    async def main() -> bytes:
        async with open_tunnel(URL, **options(relay_in_thread), forward_to=local) as tunnel:
            await tunnel.wait_connected()
            answers: list[bytes] = []
            visitor = threading.Thread(target=lambda: answers.append(trio.run(visit_blocking, relay_in_thread)))
            visitor.start()
            visitor.join()  # the loop is blocked meanwhile
            return answers[0]

    with local_echo() as local:
        assert on_loop(main()) == b"hello"


async def visit_blocking(relay: RelayRig) -> bytes:
    with no_hang():
        async with await connect(relay.addresses.tunnels["office"]) as visitor:
            await visitor.send_all(b"hello")
            return bytes(await visitor.receive_some())


def test_the_hosts_context_is_seen_in_its_functions(relay_in_thread: RelayRig, on_loop: Any) -> None:
    name = contextvars.ContextVar[str]("name")
    seen: list[str] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        seen.append(name.get())
        return await relay_in_thread.dial(host, port)

    async def main() -> None:
        name.set("of the host")
        async with open_tunnel(URL, **options(relay_in_thread, dial=dial)) as tunnel:
            await tunnel.wait_connected()

    on_loop(main())
    assert set(seen) == {"of the host"}


def test_relay_connect_errors_are_retried_meanwhile(relay_in_thread: RelayRig, on_loop: Any) -> None:
    """And what the status says is what the supervisor says."""
    calls: list[int] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionRefusedError
        return await relay_in_thread.dial(host, port)

    async def main() -> None:
        async with open_tunnel(URL, **options(relay_in_thread, dial=dial)) as tunnel:
            assert (await tunnel.wait_connected()).state is State.CONNECTED
            assert RelayConnectError.kind in {status.error_kind for status in tunnel.history}

    on_loop(main())
