"""A tunnel changes its key: sessions move, no visitor is dropped, and the old key no longer works."""

from __future__ import annotations

from typing import Any, Final

import pytest
import trio
import trio.testing
from memory_relay import MemoryRelay, until_cancelled
from raw_gateways import Overwhelmed, raw_gateway
from rig import (
    KEY,
    RelayRig,
    eventually,
    no_hang,
    read_all,
    read_exactly,
    rejected,
    relay_rig,
    tunnel_entry,
    until_it_raises,
    upload,
)

from pioneer_tunnel._model.errors import ReplacedError, TunnelAuthError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.gateways.takeover import ANSWER_TIMEOUT
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import EngineName, WebSocketClosed

NEW_KEY: Final = RelayKey("ptk1_the-next-key-of-the-tests-0123456789")
OTHER_KEY: Final = RelayKey("ptk1_the-key-of-another-tunnel-0123456")


def public(*keys: RelayKey) -> list[str]:
    return [str(key.identity().public_key) for key in keys]


def both_keys(**changes: Any) -> dict[str, Any]:
    return tunnel_entry(key=None, keys=public(KEY, NEW_KEY), **changes)


async def visited(rig: RelayRig, tunnel: Tunnel) -> tuple[trio.SocketStream, TunnelStream]:
    """A visitor, and its stream at the gateway, with the request read."""
    visitor = await rig.visit()
    await visitor.send_all(upload())
    with no_hang():
        stream = await tunnel.accept()
        await read_exactly(stream, len(upload()))
    return visitor, stream


async def test_a_newer_key_moves_the_tunnel_and_drops_nobody(engine: EngineName) -> None:
    async with relay_rig(engine, tunnels=[both_keys()]) as rig, rig.tunnel(instance="old") as old:
        await old.wait_connected()
        visitor, stream = await visited(rig, old)
        async with rig.tunnel(key=NEW_KEY, instance="new") as new:
            await new.wait_connected()
            for _ in range(3):
                other_visitor, other_stream = await visited(rig, new)
                await other_stream.send_all(b"from the new one")
                assert await read_exactly(other_visitor, 16) == b"from the new one"
                await other_stream.aclose()
                await other_visitor.aclose()
            assert old.status.state is State.CONNECTED, "it has a visitor"
            for size in (10, 500_000):
                await stream.send_all(bytes(size))
                assert await read_exactly(visitor, size) == bytes(size)
                await visitor.send_all(b"thank you")
                assert await read_exactly(stream, 9) == b"thank you"
            await stream.aclose()
            assert await read_all(visitor) == b""
            await visitor.aclose()
            with no_hang(), pytest.raises(ReplacedError, match=r"'new'.*newer key"):
                await old.accept()
            assert (old.status.state, old.status.error_kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
            assert new.status.state is State.CONNECTED


async def test_the_old_one_without_visitors_is_told_at_once() -> None:
    async with relay_rig(tunnels=[both_keys()]) as rig, rig.tunnel(instance="old") as old:
        await old.wait_connected()
        async with rig.tunnel(key=NEW_KEY, instance="new") as new:
            await new.wait_connected()
            with no_hang(), pytest.raises(ReplacedError):
                await old.accept()


async def test_visitors_of_the_old_one_may_stay_for_so_long() -> None:
    async with relay_rig(tunnels=[both_keys()], rotation_grace_ms=100) as rig, rig.tunnel(instance="old") as old:
        await old.wait_connected()
        visitor, stream = await visited(rig, old)
        await stream.send_all(b"half of")
        await read_exactly(visitor, 7)
        async with rig.tunnel(key=NEW_KEY, instance="new") as new:
            await new.wait_connected()
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
        await visitor.aclose()


async def test_a_gateway_that_changes_its_key_is_the_same_gateway() -> None:
    """Its old session has ended by then or is dead; in neither case is the gateway told to stop."""
    async with relay_rig(tunnels=[both_keys()]) as rig:
        for key in (KEY, NEW_KEY, KEY):
            async with rig.tunnel(key=key, instance="me") as tunnel:
                with no_hang():
                    await tunnel.wait_connected()
                visitor, stream = await visited(rig, tunnel)
                await stream.aclose()
                await visitor.aclose()


async def test_the_older_key_does_not_take_it_back(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, key=None, keys=public(KEY, NEW_KEY))
        new, leaving = await nursery.start(until_cancelled, relay.tunnel("new", key=NEW_KEY))
        await new.wait_connected()
        async with relay.tunnel("old") as old:
            await trio.sleep(600)
            assert (old.status.state, old.status.error_kind) == (State.FAILED, ErrorKind.RELAY_CONNECT_FAILED)
            assert "'new' has this tunnel" in (old.status.message or "")
            assert "later key" in (old.status.message or "")
            assert {status.state for status in new.history} == {State.STARTING, State.CONNECTED}
            leaving.cancel()
            with trio.fail_after(40):
                await old.wait_connected()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("instance", "within"), [("new", ANSWER_TIMEOUT + 0.1), ("old", 1.0)])
async def test_a_retired_session_that_is_dead_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, instance: str, within: float
) -> None:
    """The dead session of a gateway is gone within a second, whichever key the gateway reconnects with."""
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, key=None, keys=public(KEY, NEW_KEY))
        async with relay.tunnel("old") as old:
            await old.wait_connected()
            visitor = await relay.visit()
            await visitor.send_all(upload())
            await old.accept()
            relay.cables[0].pull()
            async with relay.tunnel(instance, key=NEW_KEY) as new:
                started = trio.current_time()
                await new.wait_connected()
                assert trio.current_time() == started, "at once"
                assert (await read_all(visitor)).startswith(b"HTTP/1.1 502 ")
                assert relay.cables[0].let_go
                assert trio.current_time() - started < within
        nursery.cancel_scope.cancel()


async def test_a_ghost_that_is_retired_is_gone_when_its_gateway_comes_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It does not get the tunnel, but its dead session ends."""
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, key=None, keys=public(KEY, NEW_KEY))
        async with relay.tunnel("old") as old:
            await old.wait_connected()
            visitor = await relay.visit()
            await visitor.send_all(upload())
            await old.accept()
            async with relay.tunnel("new", key=NEW_KEY) as new:
                await new.wait_connected()
                await trio.sleep(5)
                relay.cables[0].pull()
                async with relay.tunnel("old") as back:
                    started = trio.current_time()
                    assert (await read_all(visitor)).startswith(b"HTTP/1.1 502 ")
                    while not (relay.cables[0].let_go and back.status.message):
                        await trio.sleep(0.01)
                    assert trio.current_time() - started < 1
                    await trio.sleep(0.1)  # for the answer to `back`
                    assert "'new' has this tunnel" in (back.status.message or "")
        nursery.cancel_scope.cancel()


async def test_retired_sessions_do_not_pile_up() -> None:
    class Piled(Overwhelmed):
        def __init__(self, instance: str) -> None:
            self.instance = instance
            self.key_id = instance
            self.told: list[str] = []

        def retire(self, by: str) -> None:
            self.told.append("retire")

        def replace(self, by: str) -> None:
            self.told.append("replace")

    directory = LocalDirectory()
    sessions = [Piled(f"host-{number}") for number in range(12)]
    for session in sessions:
        await directory.enter("office", session)
    assert [session.told for session in sessions[:3]] == [["retire", "replace"]] * 3
    assert [session.told for session in sessions[3:]] == [["retire"]] * 8 + [[]]
    for session in sessions:
        await directory.leave("office", session)
    assert await directory.find("office") is None


async def test_a_visitor_who_waits_for_the_old_one_gets_the_new_one() -> None:
    """It had found the old session, and the tunnel moved before a stream was open."""

    class Moving(Overwhelmed):
        async def open_stream(self) -> ByteStream:
            await directory.enter("office", Ready())
            raise trio.BrokenResourceError("the session takes no more streams")

        def replace(self, by: str) -> None:
            """Nothing is left to do."""

    class Ready(Overwhelmed):
        async def open_stream(self) -> ByteStream:
            ours, theirs = trio.testing.memory_stream_pair()
            gateways.append(theirs)
            return adopt(ours)

    gateways: list[trio.abc.Stream] = []
    directory = LocalDirectory()
    await directory.enter("office", Moving())
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(upload())
        await eventually(lambda: bool(gateways))
        assert await gateways[0].receive_some()
        nursery.cancel_scope.cancel()


# Withdrawn


async def test_a_key_that_is_taken_out_ends_its_session_and_no_other(engine: EngineName) -> None:
    home = {"id": "home", "url": "http://home.test", "key": public(OTHER_KEY)[0]}
    async with (
        relay_rig(engine, tunnels=[both_keys(), home]) as rig,
        rig.tunnel(instance="old") as old,
        rig.tunnel(key=OTHER_KEY) as untouched,
    ):
        await untouched.wait_connected()
        await old.wait_connected()
        visitor, stream = await visited(rig, old)
        async with rig.tunnel(key=NEW_KEY, instance="new") as new:
            await new.wait_connected()
            stays, staying = await visited(rig, new)
            await rig.apply(tunnels=[tunnel_entry(key=public(NEW_KEY)[0]), home])
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            with no_hang():
                await rejected(old)
            await staying.send_all(b"still here")
            assert await read_exactly(stays, 10) == b"still here"
            assert [tunnel.status.state for tunnel in (new, untouched)] == [State.CONNECTED] * 2
            assert not [status for status in untouched.history if status.state is State.RECONNECTING]
            with pytest.raises(TunnelAuthError):
                async with raw_gateway(rig):
                    pass
            for one in (visitor, stays):
                await one.aclose()


async def test_a_revoked_session_hears_a_close_with_1008(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, raw_gateway(rig) as (websocket, _):
        await rig.apply(tunnels=[])
        with no_hang(), pytest.raises(WebSocketClosed) as closed:
            await until_it_raises(websocket.receive)
        assert closed.value.code == 1008
        assert "not registered" in closed.value.reason


async def test_a_key_that_is_removed_while_its_gateway_waits_does_not_get_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, takeover="first")
        async with relay.tunnel("dead") as dead:
            await dead.wait_connected()
            relay.cables[0].pull()
            async with relay.tunnel("waits") as waits:
                await trio.sleep(ANSWER_TIMEOUT / 2)
                relay.registry.replace([])
                await relay.control.registry_changed()
                with trio.fail_after(10), pytest.raises(TunnelAuthError):
                    await waits.accept()
                assert await relay.directory.find("office") is None
        nursery.cancel_scope.cancel()
