"""What comes from another node is checked: a broken or hostile one harms its own streams, and no memory grows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from node_rig import PROCESS, Machines, Sessions, holding
from rig import connect, eventually, no_hang, read_all

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._net.stream_link import StreamLink
from pioneer_tunnel._wire.messages import Message
from pioneer_tunnel.relay.fleet import hops, node_link, node_links
from pioneer_tunnel.relay.fleet.networks import Reached
from pioneer_tunnel.relay.fleet.node_link import greet, receive_message
from pioneer_tunnel.relay.fleet.node_messages import (
    MOST_BYTES,
    framed,
    gateway_fields,
    order_fields,
    parse_gateway,
    parse_message,
    parse_order,
    parse_services,
    parse_whole,
    visit_fields,
)
from pioneer_tunnel.relay.fleet.peers import Order, OrderKind
from pioneer_tunnel.relay.gateways.other_nodes import PassedGateway
from pioneer_tunnel.yamux import Role, YamuxConnection, YamuxStream

RETIRE: Final = Order(OrderKind.RETIRE, by="b")


async def until_its_end(stream: trio.abc.ReceiveStream) -> None:
    with suppress(trio.BrokenResourceError):
        await read_all(stream)


async def greeted(machines: Machines, name: str = "far") -> Reached:
    """A link of the machine `far` to the node `near`, after its greeting."""
    reached = await machines.network("far").dial("near", None)
    await greet(reached.stream, name, PROCESS)
    return reached


@asynccontextmanager
async def raw_link(machines: Machines) -> AsyncIterator[YamuxConnection]:
    """A link of `far` whose streams a test writes itself."""
    reached = await greeted(machines)
    connection = YamuxConnection(StreamLink(reached.stream, reached.watched), Role.CLIENT, heartbeat=60)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await connection.run()

        yield connection
        nursery.cancel_scope.cancel()


def sized(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


REFUSED: Final[dict[str, bytes]] = {
    "too long": (MOST_BYTES + 1).to_bytes(2, "big"),
    "no JSON": sized(b"{"),
    "no UTF-8": sized(b"\xff"),
    "no object": sized(b"[]"),
    "a type of no text": sized(b'{"type":7}'),
    "a field that is missing": sized(b'{"type":"visit","tunnel":"office"}'),
    "a field of another type": sized(b'{"type":"visit","tunnel":7,"session":"s"}'),
    "a field that is there twice": sized(b'{"type":"visit","tunnel":"a","tunnel":"b","session":"s"}'),
    "an order that waits for a text": sized(
        b'{"type":"order","tunnel":"a","session":"s","order":"answers","within":"x"}'
    ),
    "more than the request": framed(visit_fields("office", "s")) + b"!",
    "an end within the request": framed(visit_fields("office", "s"))[:-1],
}


@pytest.mark.parametrize("what", REFUSED)
async def test_a_request_that_breaks_the_protocol_resets_its_stream_alone(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    machines, sessions = Machines(tmp_path, "near", "far"), Sessions()
    with no_hang():
        async with machines.node("near", sessions), raw_link(machines) as link:
            stream = await link.open_stream()
            await stream.send_all(REFUSED[what])
            if what.startswith("an end"):
                await stream.send_eof()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
            assert "node far breaks the protocol" in caplog.text
            stream = await link.open_stream()
            await stream.send_all(framed(order_fields("office", "s", RETIRE)))
            assert (await receive_message(stream)).type == "done"
    assert sessions.orders == [("s", RETIRE)]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "of a later version"},
        {"type": "order", "tunnel": "a", "session": "s", "order": "of a later version"},
        {"type": "gateway"},
    ],
)
async def test_a_request_that_is_not_known_is_said_so(tmp_path: Path, fields: dict[str, Any]) -> None:
    machines = Machines(tmp_path, "near", "far")
    with no_hang():
        async with machines.node("near"), raw_link(machines) as link:
            stream = await link.open_stream()
            await stream.send_all(framed(fields))
            assert (await receive_message(stream)).type == "unknown"


async def test_a_request_may_come_in_pieces_but_not_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines, sessions = Machines(tmp_path, "near", "far"), Sessions()
    with no_hang():
        async with machines.node("near", sessions), raw_link(machines) as link:
            stream = await link.open_stream()
            for byte in framed(order_fields("office", "s", RETIRE)):
                await stream.send_all(bytes([byte]))
                await trio.sleep(0)
            assert (await receive_message(stream)).type == "done"
            monkeypatch.setattr(hops, "REQUEST_TIMEOUT", 0.1)
            stream = await link.open_stream()
            await stream.send_all(b"\0")
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)


async def test_strangers_cannot_fill_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_links, "MOST_GREETING", 2)
    monkeypatch.setattr(node_links, "GREETING_TIMEOUT", 1.0)
    machines = Machines(tmp_path, "near", "far")
    with no_hang():
        async with machines.node("near", Sessions()), machines.node("far") as far:
            address = machines.addresses["near"]
            silent = [await connect(address) for _ in range(2)]
            third = await connect(address)
            await until_its_end(third)  # at once
            for stranger in silent:
                await until_its_end(stranger)  # after the timeout
            async with await connect(address) as stranger:
                await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n")
                await until_its_end(stranger)
            assert await far.order("office", holding("near"), RETIRE) is False
            await eventually(lambda: far.distance("near") < 1)
            for stranger in (*silent, third):
                await stranger.aclose()


async def test_the_oldest_of_too_many_links_ends(tmp_path: Path) -> None:
    machines = Machines(tmp_path, "near", "far")
    with no_hang():
        async with machines.node("near", Sessions()):
            links = [await greeted(machines) for _ in range(node_links.MOST_LINKS + 2)]
            for number, reached in enumerate(links):
                if number < 2:
                    await read_all(reached.stream)  # up to its end
            connection = YamuxConnection(StreamLink(links[2].stream, links[2].watched), Role.CLIENT, heartbeat=60)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_until_cancelled, connection)
                assert await connection.answers(60)
                nursery.cancel_scope.cancel()
            for reached in links:
                await trio.aclose_forcefully(reached.stream)


async def run_until_cancelled(connection: YamuxConnection) -> None:
    await connection.run()


@pytest.mark.parametrize("name", ["near", "fra7", "farther", "near/1", "far/1"])
async def test_a_node_cannot_greet_as_another_one(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    machines = Machines(tmp_path, "near", "far")
    with no_hang():
        async with machines.node("near", Sessions()):
            reached = await greeted(machines, name)
            await until_its_end(reached.stream)
            await trio.aclose_forcefully(reached.stream)
            assert "with the name of another node" in caplog.text


ANSWERS: Final[dict[str, bytes]] = {
    "too long": b"\xff\xff",
    "no JSON": sized(b"?"),
    "services of no list": sized(b'{"type":"opened","services":7}'),
    "services of no texts": sized(b'{"type":"opened","services":[7]}'),
    "too many services": sized(json.dumps({"type": "opened", "services": ["a"] * 257}).encode()),
    "unknown": sized(b'{"type":"unknown"}'),
    "an end": sized(b'{"type":"opened"}')[:-1],
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_an_answer_that_makes_no_sense_is_a_broken_stream(tmp_path: Path, what: str) -> None:
    async with hostile_node(tmp_path, partial(say, ANSWERS[what])) as far:
        with pytest.raises(trio.BrokenResourceError, match="node"):
            await far.open_stream("office", holding("near"))
        assert await far.order("office", holding("near"), RETIRE) is False


async def say(answer: bytes, stream: YamuxStream) -> None:
    stream.acknowledge()
    await stream.send_all(answer)
    await stream.send_eof()


async def test_no_answer_is_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_link, "ANSWER_TIMEOUT", 1.0)

    async def nothing(stream: YamuxStream) -> None:
        stream.acknowledge()

    async with hostile_node(tmp_path, nothing) as far:
        with pytest.raises(trio.BrokenResourceError, match="did not answer within"):
            await far.open_stream("office", holding("near"))


async def test_what_a_gateway_sends_at_once_is_behind_the_answer(tmp_path: Path) -> None:
    answer = framed({"type": "opened", "services": ["web", ""]}) + b"the gateway's"
    async with hostile_node(tmp_path, partial(say, answer)) as far:
        hop = await far.open_stream("office", holding("near"))
        assert hop.services == {"web", ""}
        assert await read_all(hop.stream) == b"the gateway's"
        await hop.stream.aclose()


@asynccontextmanager
async def hostile_node(
    folder: Path, handle: Callable[[YamuxStream], Awaitable[None]]
) -> AsyncIterator[node_links.NodeLinks]:
    """The node `near` is one whose streams a test answers."""
    machines = Machines(folder, "near", "far")
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    network = machines.network("near")

    async def serve(stream: trio.SocketStream) -> None:
        reached = await network.accept(stream)
        await greet(reached.stream, "near", PROCESS)
        async with trio.open_nursery() as nursery:
            connection = YamuxConnection(
                StreamLink(reached.stream, reached.watched),
                Role.SERVER,
                heartbeat=60,
                on_stream=lambda stream: nursery.start_soon(handle, stream),
            )
            await connection.run()

    with no_hang():
        async with machines.node("far") as far, trio.open_nursery() as nursery:
            machines.addresses["near"] = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            yield far
            nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@fuzzed()
@given(TEXTS, TEXTS, st.sampled_from(OrderKind), TEXTS, st.floats(0, 1e6))
def test_an_order_is_read_as_it_was_written(tunnel: str, session: str, kind: OrderKind, by: str, within: float) -> None:
    order = Order(kind, by, within)
    request = parse_whole(framed(order_fields(tunnel, session, order)))
    assert request is not None
    assert (request.text("tunnel"), request.text("session"), parse_order(request)) == (tunnel, session, order)


ADDRESSES: Final = st.builds(Address, st.ip_addresses().map(str), st.integers(min_value=0, max_value=65535))


@fuzzed()
@given(st.none() | ADDRESSES, st.none() | st.binary(min_size=32, max_size=32))
def test_a_gateway_is_read_as_it_was_written(peer: Address | None, certificate: bytes | None) -> None:
    passed = PassedGateway(peer=peer, certificate=certificate)
    request = parse_whole(framed(gateway_fields(passed)))
    assert request is not None
    assert parse_gateway(request) == passed


@fuzzed()
@given(st.binary(max_size=80))
def test_anything_else_is_refused_or_waited_for(received: bytes) -> None:
    with suppress(RemoteProtocolError):
        parse_whole(received)


@fuzzed()
@given(
    st.dictionaries(st.sampled_from(["peer", "certificate", "services", "order", "by", "within"]), st.none() | TEXTS)
)
def test_fields_of_any_text_are_refused_or_read(fields: dict[str, Any]) -> None:
    message = parse_message(json.dumps({"type": "x"} | fields).encode())
    assert isinstance(message, Message)
    for read in (parse_order, parse_gateway, parse_services):
        with suppress(RemoteProtocolError):
            read(message)


@fuzzed()
@given(st.data())
def test_a_message_is_complete_with_its_last_byte(data: st.DataObject) -> None:
    whole = framed(visit_fields(data.draw(TEXTS), data.draw(TEXTS)))
    end = data.draw(st.integers(0, len(whole) - 1))
    assert parse_whole(whole[:end]) is None
    assert parse_whole(whole) is not None
