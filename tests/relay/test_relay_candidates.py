"""Gateways that do not accept the relay, or only keep silent, do not disturb the one that has the tunnel."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from memory_relay import relay_in_memory
from raw_gateways import raw_gateway
from rig import (
    KEY,
    RELAY_NAME,
    ask,
    echo,
    eventually,
    in_background,
    no_hang,
    read_exactly,
    relay_rig,
    request,
    until_it_raises,
    upload,
)

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import ReplacedError
from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity
from pioneer_tunnel._model.status import State
from pioneer_tunnel._wire.handshake import SUBPROTOCOL, GatewayHandshake, Welcome
from pioneer_tunnel.relay.gateways.registry import MOST_CANDIDATES
from pioneer_tunnel.relay.gateways.takeover import Takeover
from pioneer_tunnel.websocket import EngineName, Opening, load_engine
from pioneer_tunnel.yamux.frames import ACK, SYN, FrameType, encode_header


def of_another_relay() -> PublicKey:
    return SigningIdentity.generate().public_key


@pytest.mark.parametrize("instance", ["host-a", "host-b"], ids=["its own instance", "another"])
@pytest.mark.parametrize("takeover", [*Takeover])
async def test_a_gateway_that_rejects_the_relay_replaces_nobody(
    autojump_clock: trio.testing.MockClock, takeover: Takeover, instance: str, engine: EngineName
) -> None:
    """It pins another identity, closes after the welcome, and retries."""
    async with relay_in_memory(takeover=takeover, engine=engine) as relay, relay.tunnel("host-a") as holder:
        await holder.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(upload())
        stream = await holder.accept()
        await read_exactly(stream, len(upload()))
        pinned = relay.tunnel(instance, relay_identity=of_another_relay(), websocket_engine=engine)
        async with pinned as rejecting:
            for _ in range(5):
                await trio.sleep(60)
                await visitor.send_all(b"still here")
                with trio.fail_after(5):
                    assert await read_exactly(stream, 10) == b"still here"
            assert len(relay.cables) > 5, "it tries on"
            assert {status.state for status in rejecting.history} == {State.STARTING, State.FAILED}
        assert {status.state for status in holder.history} == {State.STARTING, State.CONNECTED}


async def test_one_with_a_newer_key_does_not_retire_the_holder_either(
    autojump_clock: trio.testing.MockClock,
) -> None:
    newer = RelayKey("ptk1_a-newer-key-of-the-tests-0123456789")
    keys = [str(key.identity().public_key) for key in (KEY, newer)]
    async with relay_in_memory(key=None, keys=keys) as relay, relay.tunnel("host-a") as holder:
        await holder.wait_connected()
        async with relay.tunnel("host-b", key=newer, relay_identity=of_another_relay()):
            await trio.sleep(60)
        visitor = await relay.visit()
        await visitor.send_all(request())
        with trio.fail_after(5):
            await holder.accept()
        assert {status.state for status in holder.history} == {State.STARTING, State.CONNECTED}


async def test_the_silent_ones_are_few(engine: EngineName) -> None:
    """Many gateways with the key that send nothing after the welcome do not disturb the tunnel."""
    more, dropped = 4, 0
    async with relay_rig(engine) as rig, rig.tunnel(instance="host-a") as tunnel:
        await tunnel.wait_connected()

        async def be_silent(*, task_status: trio.TaskStatus[None]) -> None:
            nonlocal dropped
            async with raw_gateway(rig, instance="silent", accepting=False) as (websocket, _):
                task_status.started()
                with pytest.raises(trio.BrokenResourceError):
                    await until_it_raises(websocket.receive)
                dropped += 1

        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])), trio.open_nursery() as silent:
            for _ in range(MOST_CANDIDATES + more):
                await silent.start(be_silent)
                async with await rig.visit() as visitor:
                    assert await ask(visitor, request()) == request()
            await eventually(lambda: dropped >= more)
            silent.cancel_scope.cancel()
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_the_silent_ones_are_soon_gone(autojump_clock: trio.testing.MockClock, engine: EngineName) -> None:
    async with relay_in_memory(engine=engine) as relay, relay.tunnel("host-a", websocket_engine=engine) as tunnel:
        await tunnel.wait_connected()
        started = trio.current_time()
        opening = GatewayHandshake(KEY.identity(), audience=RELAY_NAME, service="any", instance="silent")
        wanted = Opening(subprotocol=SUBPROTOCOL, address=RelayAddress.parse(f"ws://{RELAY_NAME}"))
        async with load_engine(engine).connect(await relay.dial(RELAY_NAME, 80), wanted) as websocket:
            answer: object = None
            while not isinstance(answer, Welcome):
                for text in await websocket.receive():
                    if isinstance(text, str):
                        answer = opening.receive(text)
                        if isinstance(answer, str):
                            await websocket.send([answer])
            with pytest.raises(trio.BrokenResourceError):
                await until_it_raises(websocket.receive)
        assert 10 <= trio.current_time() - started <= 12
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_a_gateway_that_only_answers_is_counted(engine: EngineName) -> None:
    """It sends nothing of its own before its heartbeat, but the relay pings at once."""
    async with relay_rig(engine) as rig, rig.tunnel(instance="host-a") as first:
        await first.wait_connected()
        async with raw_gateway(rig, instance="host-b", accepting=False) as (websocket, early):
            received = early
            with no_hang():
                while len(received) < 12:
                    for message in await websocket.receive():
                        assert not isinstance(message, str)
                        received += message
            assert received[:4] == encode_header(FrameType.PING, SYN, 0, 0)[:4]
            assert first.status.state is State.CONNECTED
            await websocket.send([encode_header(FrameType.PING, ACK, 0, int.from_bytes(received[8:12], "big"))])
            with no_hang(), pytest.raises(ReplacedError, match="'host-b'"):
                await first.accept()
