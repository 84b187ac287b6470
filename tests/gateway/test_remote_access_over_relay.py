"""`RemoteAccess` over a relay on loopback: what only real sockets, threads and files can show."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Final, NoReturn

import pytest
import trio
import trio.testing
from gateway import OTHER_KEY, Gateway, running, shown
from rig import (
    HOST,
    KEY as RELAY_KEY,
    RELAY_NAME,
    RelayRig,
    eventually,
    living_tasks,
    no_hang,
    nothing_left_behind,
    read_exactly,
    read_until,
    relay_rig,
    request,
    tunnel_entry,
)
from statuses import check_contract

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.dialing import dial_tcp
from pioneer_tunnel.gateway.keystore import DEFAULT_SECRET_REF
from pioneer_tunnel.gateway.remote_access import RemoteAccess
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.transports.interface import Deliver, Report, Session, Target
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

BOUND: Final = [tunnel_entry(bind_addr="127.0.0.1:0")]


class Dialling:
    """The way to the relay and to the local gateway, with a memory of the connections that were made."""

    def __init__(self, rig: RelayRig) -> None:
        self._rig = rig
        self.made: list[trio.SocketStream] = []

    async def __call__(self, host: str, port: int) -> trio.SocketStream:
        stream = await (self._rig.dial(host, port) if host == RELAY_NAME else dial_tcp(host, port))
        self.made.append(stream)
        return stream

    def open(self) -> int:
        return sum(stream.socket.fileno() != -1 for stream in self.made)


def over_relay(gateway: Gateway, rig: RelayRig, config: dict[str, Any] | None = None, **changes: Any) -> RemoteAccess:
    fields = {"relay_addr": f"ws://{RELAY_NAME}", "restart_initial_ms": 10} | (config or {})
    arguments: dict[str, Any] = {"transports": TRANSPORTS, "dial": Dialling(rig)}
    return gateway.remote_access(fields, **(arguments | changes))


@contextlib.asynccontextmanager
async def up(remote_access: RemoteAccess) -> AsyncIterator[trio.Nursery]:
    with no_hang():
        async with running(remote_access) as nursery:
            await remote_access.apply(SettingsUpdate(enabled=True, key=RELAY_KEY))
            await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
            yield nursery


async def say_back(stream: TunnelStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


async def test_a_visitor_is_served_by_a_handler_and_leaving_run_leaves_nothing(real_gateway: Gateway) -> None:
    async with relay_rig() as rig:
        await trio.testing.wait_all_tasks_blocked(0.01)
        before = living_tasks()
        with nothing_left_behind():
            remote_access = over_relay(real_gateway, rig, handler=say_back)
            async with up(remote_access):
                assert remote_access.status.public_url == f"http://{HOST}"
                visitor = await rig.visit()
                await visitor.send_all(request(body=b"hello"))
                await read_exactly(visitor, len(request(body=b"hello")))
            assert shown(remote_access) == (State.STOPPED, None)
            with pytest.raises(trio.BrokenResourceError):
                await read_exactly(visitor, 1)
            await visitor.aclose()
            await eventually(lambda: living_tasks() <= before)  # the relay's side takes a moment


async def test_the_local_gateway_is_told_who_visits(real_gateway: Gateway) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    config = {
        "local_addr": f"127.0.0.1:{listener.socket.getsockname()[1]}",
        "forwarded_headers": "set",
        "host_header": "localhost:3000",
    }
    async with (
        listener,
        relay_rig() as rig,
        up(over_relay(real_gateway, rig, config, handler=None)),
        await rig.visit() as visitor,
    ):
        await visitor.send_all(request("X-Forwarded-For: 127.0.0.66"))
        head = b""
        while not head:  # a probe connects and says nothing
            async with await listener.accept() as server:
                head = bytes(await server.receive_some())
        assert head.startswith(b"GET / HTTP/1.1\r\nHost: localhost:3000\r\nX-Forwarded-For: 127.0.0.1\r\n")


async def test_a_wrong_key_is_told_and_the_right_one_mends_it(real_gateway: Gateway) -> None:
    async with relay_rig() as rig:
        remote_access = over_relay(real_gateway, rig)
        with no_hang():
            async with running(remote_access):
                await remote_access.apply(SettingsUpdate(enabled=True, key=OTHER_KEY))
                await remote_access.settled()
                assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
                await remote_access.apply(SettingsUpdate(key=RELAY_KEY))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
        check_contract(remote_access.history)


async def test_a_generation_begins_when_the_sockets_of_the_old_one_are_closed(real_gateway: Gateway) -> None:
    open_at_start: list[int] = []
    serving = 0

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        nonlocal serving
        open_at_start.append(dial.open())
        serving += 1
        assert serving == 1
        try:
            await TRANSPORTS["websocket"](target, deliver, report, task_status=task_status)
        finally:
            serving -= 1
        raise AssertionError

    async with relay_rig() as rig, trio.open_nursery() as nursery:
        dial = Dialling(rig)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, trio.aclose_forcefully, listeners)
        remote_access = over_relay(
            real_gateway,
            rig,
            {"local_addr": f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", "apply_grace_ms": 20},
            dial=dial,
            handler=None,
            transports={"websocket": serve},
        )
        async with up(remote_access):
            for number in range(10):
                visitor = await rig.visit()
                await visitor.send_all(request())
                await remote_access.apply(SettingsUpdate(server=f"wss://{number}.test"))
                await remote_access.settled()
                await visitor.aclose()
            assert shown(remote_access) == (State.CONNECTED, None)
        assert open_at_start == [0] * 11
        assert dial.open() == 0
        nursery.cancel_scope.cancel()


async def test_streams_that_a_handler_holds_are_broken_and_never_awaited(real_gateway: Gateway) -> None:
    held, broken, let_go = trio.Event(), trio.Event(), trio.Event()

    async def handler(stream: TunnelStream) -> None:
        with trio.CancelScope(shield=True):
            await stream.send_all(b"half an answer")
            held.set()
            with pytest.raises(trio.BrokenResourceError):
                await read_exactly(stream, 1_000_000)
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")
            broken.set()
            await let_go.wait()

    async with relay_rig() as rig:
        remote_access = over_relay(real_gateway, rig, {"apply_grace_ms": 100}, handler=handler)
        async with up(remote_access):
            try:
                visitor = await rig.visit()
                await visitor.send_all(request())
                assert await read_exactly(visitor, 14) == b"half an answer"
                await held.wait()
                await remote_access.apply(SettingsUpdate(server="wss://changed.test"))
                await remote_access.settled()
                assert shown(remote_access) == (State.CONNECTED, None)
                await broken.wait()
                with pytest.raises(trio.BrokenResourceError):  # a reset: half an answer is not taken for a whole one
                    await read_exactly(visitor, 1)
                await visitor.aclose()
            finally:
                let_go.set()


async def reset(visitor: trio.SocketStream) -> None:
    """The visitor's connection ends, and not orderly."""
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some(1)
    await visitor.aclose()


async def control(remote_access: RemoteAccess, stream: trio.abc.Stream) -> None:
    """A line of JSON in, an update made, a line of JSON out; then the connection stays open, as a WebSocket does."""
    try:
        line = b""
        while not line.endswith(b"\n"):
            data = await stream.receive_some()
            if not data:
                return  # it was only looked whether somebody is here
            line += data
        fields = json.loads(line)
        if "key" in fields:
            fields["key"] = RelayKey(fields["key"])
        await remote_access.apply(SettingsUpdate(**fields))
        snapshot = await remote_access.snapshot()
        await stream.send_all(json.dumps(snapshot.to_wire()).encode() + b"\n")
        await stream.receive_some(1)
    except trio.BrokenResourceError:
        pass


@pytest.mark.parametrize("forwarded", [False, True], ids=["in process", "forwarded"])
async def test_an_update_through_the_tunnel_that_it_changes_gets_its_reply(
    real_gateway: Gateway, forwarded: bool, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1  # the real time, but for the grace, which is over when the reply is here
    async with relay_rig(tunnels=BOUND) as rig, trio.open_nursery() as nursery:

        async def handler(stream: trio.abc.Stream) -> None:
            await control(remote_access, stream)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        remote_access = over_relay(
            real_gateway,
            rig,
            {"local_addr": f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", "apply_grace_ms": 20_000},
            handler=None if forwarded else handler,
        )

        async def ask(**update: object) -> tuple[dict[str, Any], trio.SocketStream]:
            visitor = await trio.open_tcp_stream("127.0.0.1", rig.addresses.tunnels["office"].port)
            await visitor.send_all(json.dumps(update).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await read_until(visitor, b"\n"))
            return answer, visitor

        async with up(remote_access):
            # To a key that the relay does not know, and back by a way of one's own.
            answer, visitor = await ask(key=OTHER_KEY.reveal())
            assert answer["has_key"]
            mock_clock.jump(20)
            await remote_access.settled()
            assert shown(remote_access) == (State.FAILED, ErrorKind.TUNNEL_AUTH_FAILED)
            await reset(visitor)
            await remote_access.apply(SettingsUpdate(key=RELAY_KEY))
            await remote_access.settled()
            answer, visitor = await ask(server="wss://changed.test", enabled=True)
            await visitor.aclose()
            await remote_access.settled()
            answer, visitor = await ask(enabled=False)
            assert answer["enabled"] is False
            mock_clock.jump(20)
            await remote_access.settled()
            assert shown(remote_access) == (State.DISABLED, None)
            await reset(visitor)
        nursery.cancel_scope.cancel()


async def test_a_gateway_that_comes_back_takes_its_tunnel_over(real_gateway: Gateway) -> None:
    """Its instance is kept over restarts: the relay takes the new process for the same gateway."""
    async with relay_rig() as rig:
        first = over_relay(real_gateway, rig)
        second = over_relay(real_gateway, rig, handler=say_back)
        async with up(first), running(second):
            # They take it from each other for as long as both run.
            await eventually(lambda: (State.CONNECTED, None) in said_by(second))
            lost = (State.RECONNECTING, ErrorKind.RELAY_CONNECT_FAILED)
            await eventually(lambda: lost in said_by(first))


def said_by(remote_access: RemoteAccess) -> list[tuple[State, ErrorKind | None]]:
    return [(status.state, status.error_kind) for status in remote_access.history]


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 8, 20, 50])
async def test_leaving_run_at_any_moment_leaves_no_task_and_no_socket(real_gateway: Gateway, milliseconds: int) -> None:
    real_gateway.store()
    await real_gateway.keystore.put(DEFAULT_SECRET_REF, RELAY_KEY)
    async with relay_rig() as rig:
        dial = Dialling(rig)
        remote_access = over_relay(real_gateway, rig, handler=say_back, dial=dial)
        with trio.move_on_after(milliseconds / 1000):
            await remote_access.run()
        assert dial.open() == 0
        assert shown(remote_access) == (State.STOPPED, None)
        async with running(remote_access):
            with no_hang():
                await remote_access.settled()
            assert shown(remote_access) == (State.CONNECTED, None)
