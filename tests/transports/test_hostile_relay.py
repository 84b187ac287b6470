"""A gateway whose relay wants it ill: memory and tasks stay within bounds, other visitors are served, and it ends as
it should. Nothing that a relay says makes the gateway connect to anything but its local address."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import pytest
import trio
import trio.testing
from hostile import (
    BINARY,
    CONTINUATION,
    HEADER,
    LOCAL,
    PING,
    PONG,
    RSV1,
    TEXT,
    WELCOME,
    GatewayOfBytes,
    HostileRelay,
    RelayOfBytes,
    at_most,
    binaries,
    challenge,
    frame,
    text,
)
from memory_relay import MemoryRelay
from rig import (
    KEY,
    RELAY_NAME,
    ask,
    echo,
    eventually,
    in_background,
    living_tasks,
    no_hang,
    read_all,
    request,
    tunnel_entry,
    until_it_raises,
)
from yamux_rig import KIB, data, go_away as go_away_frame, ping as ping_frame, update

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import LinkLostError, RelayConnectError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.testing import open_pioneer_relay
from pioneer_tunnel.transports.rathole.codec import ControlCommand, encode_command
from pioneer_tunnel.transports.rathole.data_channels import MOST_IDLE
from pioneer_tunnel.tunnel.tunnel import open_tunnel
from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.yamux import Limits, Role
from pioneer_tunnel.yamux.events import StreamOpened
from pioneer_tunnel.yamux.frames import RST, SYN, FrameType, encode_header
from pioneer_tunnel.yamux.session import Session

MIB: Final = 1024 * KIB
BUDGET: Final = 12 * MIB
"""What an attack may make a gateway hold. Of it are 2 MiB the pipes between the two and 256 KiB the read buffer."""

Attack = Callable[[RelayOfBytes], Awaitable[object]]


def opens_and_resets(count: int) -> bytes:
    return b"".join(update(2 * number + 1, SYN | RST) for number in range(count))


# Floods that break no rule: they cost their sender more than the gateway, and others are served meanwhile

COUNT: Final = 1000
LAST_ID: Final = 2 * COUNT + 1
OPEN: Final = binaries(data(1, HEADER, SYN))

FLOODS: Final[dict[str, bytes]] = {
    "pings": binaries(b"".join(map(ping_frame, range(COUNT)))),
    "pongs": binaries(b"".join(ping_frame(number, 2) for number in range(COUNT))),
    "openings": binaries(b"".join(update(2 * number + 1, SYN) for number in range(COUNT))),
    "openings that are taken back": binaries(opens_and_resets(COUNT)),
    "openings with junk": binaries(b"".join(data(2 * number + 1, b"GET", SYN) for number in range(COUNT))),
    "resets": OPEN + binaries(update(1, RST) * COUNT),
    "credit of nothing": OPEN + binaries(update(1) * COUNT),
    "credit by the byte": OPEN + binaries(update(1, 0, 1) * COUNT),
    "data of nothing": OPEN + binaries(data(1) * COUNT),
    "data by the byte": OPEN + binaries(data(1, b"x") * COUNT),
    "messages of nothing": frame(BINARY) * COUNT,
    "pieces of nothing": frame(BINARY, fin=False) + frame(CONTINUATION, fin=False) * COUNT + frame(CONTINUATION),
    "WebSocket pings": frame(PING, b"!") * 200,
    "WebSocket pongs": frame(PONG, b"!") * COUNT,
    "texts of unknown type": text({"type": "weather"}) * COUNT,
    "large texts": text({"type": "weather", "sky": "blue" * 4000}) * 30,
    "nested texts": text('{"type":"weather","sky":' + "[" * 400 + "]" * 400 + "}") * 200,
    "large numbers": text('{"type":"weather","sky":' + "9" * 4000 + "}") * 30,
    "drainings": text({"type": "draining", "reconnect_within_ms": 1}) * COUNT,
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_is_bounded_and_others_are_served(
    engine: EngineName, autojump_clock: trio.testing.MockClock, flood: str
) -> None:
    async def attack(relay: RelayOfBytes) -> None:
        await relay.welcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            await relay.say(FLOODS[flood])
            await trio.sleep(6)  # half-open streams are given up after 5
            await relay.visit(LAST_ID + 2)
            nursery.cancel_scope.cancel()

    hostile = HostileRelay(attack, engine)
    with at_most(BUDGET):
        failure = await hostile.run()
    assert str(failure).endswith("the connection ended without a close frame")  # which is how the attack ends
    assert hostile.most_tasks < 300
    assert set(hostile.dialled) == {LOCAL}


async def test_streams_that_never_name_their_visitor_are_bounded(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    async def attack(relay: RelayOfBytes) -> None:
        await relay.welcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            before = living_tasks()
            await relay.say(binaries(b"".join(data(2 * number + 1, HEADER[:5], SYN) for number in range(1000))))
            await trio.sleep(1)
            assert relay.count(FrameType.WINDOW_UPDATE, RST) == 1000 - 256
            assert living_tasks() - before <= 256 + 5
            await trio.sleep(5)
            assert relay.count(FrameType.WINDOW_UPDATE, RST) == 1000
            assert living_tasks() <= before + 5
            await relay.visit(2001)
            nursery.cancel_scope.cancel()

    assert isinstance(await HostileRelay(attack, engine).run(), LinkLostError)


async def test_streams_that_are_open_are_bounded(engine: EngineName, autojump_clock: trio.testing.MockClock) -> None:
    async def attack(relay: RelayOfBytes) -> None:
        await relay.welcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            for number in range(30):
                await relay.say(binaries(data(2 * number + 1, HEADER, SYN)))
                await trio.sleep(0.01)
            assert relay.count(FrameType.WINDOW_UPDATE, RST) == 20
            await relay.say(binaries(update(1, RST)))
            await relay.visit(61)
            nursery.cancel_scope.cancel()

    hostile = HostileRelay(attack, engine)
    await hostile.run(limits=Limits(streams=10))
    assert len(hostile.dialled) == 11


# What breaks a rule ends the session at once

NESTED: Final = "[" * 16_000
BREACHES: Final[list[tuple[str, bytes, str]]] = [
    ("credit that overflows", binaries(data(1, HEADER, SYN) + update(1, 0, 2**32 - 1)), "overflows 32 bits"),
    ("data over the window", binaries(data(1, HEADER, SYN) + encode_header(0, 0, 1, 2**20)), "a credit of"),
    ("data of 4 GiB", binaries(encode_header(0, SYN, 1, 2**32 - 1)), "a credit of"),
    ("data for nobody", binaries(data(7, b"x")), "never opened"),
    ("a stream of our parity", binaries(update(2, SYN)), "parity"),
    ("an id that was used", binaries(update(1, SYN) * 2), "used before"),
    ("another version", binaries(b"\1" * 12), "version 1"),
    ("an unknown type", binaries(encode_header(9, 0, 0, 0)), "unknown type 9"),
    ("openings faster than it hears", binaries(opens_and_resets(30_000)), "replies wait"),
    ("pings faster than it hears", binaries(ping_frame(0) * 30_000), "replies wait"),
    ("a go-away with an error", binaries(go_away_frame(2)), "code 2"),
    ("a text that is too large", frame(TEXT, b"x" * (16 * KIB + 1)), "16384"),
    ("a text that is no JSON", text("{"), "not JSON"),
    ("a text that is nested", text(NESTED), "not JSON"),
    ("a number that is no number", text('{"type":"draining","reconnect_within_ms":' + "9" * 15_000 + "}"), "not JSON"),
    ("a number without end", text('{"type":"draining","reconnect_within_ms":1e999}'), "makes sense"),
    ("a message that is too large", frame(BINARY, bytes(MIB + 1)), "1048576"),
    ("a compressed message", frame(BINARY, b"x", bits=RSV1), "1002"),
    ("a masked message", frame(BINARY, b"x", masked=True), "1002"),
]


@pytest.mark.parametrize(("attack", "says"), [pytest.param(*rest, id=name) for name, *rest in BREACHES])
async def test_a_broken_rule_ends_the_session(
    engine: EngineName, autojump_clock: trio.testing.MockClock, attack: bytes, says: str
) -> None:
    async def break_it(relay: RelayOfBytes) -> None:
        await relay.welcome()
        if "replies wait" in says:
            relay.stream.inbound.allow(0)
        await relay.say(attack)
        await relay.listen()

    with at_most(BUDGET):
        failure = await HostileRelay(break_it, engine).run()
    assert isinstance(failure, LinkLostError)
    assert says in str(failure), failure


async def test_a_message_in_endless_pieces_of_nothing_is_bounded(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    """Found by an attack: one engine collected them, for nine bytes each, as long as the relay liked.

    Both hand pieces on as they come, so there is nothing to collect, and the next visitor is served.
    """
    served = False

    async def attack(relay: RelayOfBytes) -> None:
        nonlocal served
        await relay.welcome()
        await relay.say(frame(BINARY, fin=False))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            await relay.say(frame(CONTINUATION, fin=False) * 17 * KIB)
            await trio.sleep(1)
            await relay.say(frame(CONTINUATION))
            await relay.visit(1)
            served = True
            nursery.cancel_scope.cancel()

    assert isinstance(await HostileRelay(attack, engine).run(), LinkLostError)
    assert served


async def test_a_relay_that_reads_nothing_is_given_up(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    """What it asks for meanwhile is not piled up for it."""
    started = 0.0

    async def attack(relay: RelayOfBytes) -> None:
        nonlocal started
        await relay.welcome()
        started = trio.current_time()
        relay.stream.inbound.allow(0)
        await relay.say(binaries(b"".join(data(2 * number + 1, HEADER, SYN) for number in range(20))))
        while True:
            await relay.say(binaries(b"".join(data(2 * number + 1, bytes(200)) for number in range(20))))
            await trio.sleep(0.5)

    with at_most(BUDGET):
        failure = await HostileRelay(attack, engine).run()
    assert "no byte for 30 seconds" in str(failure)
    assert trio.current_time() - started == pytest.approx(31, abs=1.5)


def test_openings_that_are_taken_back_at_once_do_not_pile_up() -> None:
    """Found by an attack: a message of a megabyte, all of it such pairs, made the gateway hold 175 MB for a moment."""
    session = Session(Role.SERVER)
    with at_most(MIB):
        session.receive_data(opens_and_resets(5000), 0.0)
    assert len([event for event in session.events() if isinstance(event, StreamOpened)]) == 256
    session.receive_data(update(20_001, SYN), 0.0)
    assert [type(event) for event in session.events()] == [StreamOpened]


# The opening


def too_long(start: bytes) -> Attack:
    """An answer that never ends, as fast as the gateway takes it."""

    async def attack(relay: RelayOfBytes) -> None:
        await relay.read_request()
        await relay.say(start)
        for _ in range(2000):
            await relay.say(b"X: " + b"y" * 4000 + b"\r\n")
        await trio.sleep_forever()

    return attack


async def drips(relay: RelayOfBytes) -> None:
    """A byte a second buys no time."""
    for byte in await relay.read_request() * 10:
        await relay.say(bytes([byte]))
        await trio.sleep(1)


async def chatters(relay: RelayOfBytes) -> None:
    """Nor do texts that mean nothing, as fast as they can be said."""
    await relay.upgrade()
    while True:
        await relay.say(text({"type": "weather"}) * 100)
        await trio.sleep(0.5)


async def says_nothing_in_pieces(relay: RelayOfBytes) -> None:
    await relay.upgrade()
    await relay.say(frame(TEXT, fin=False))
    while True:
        await relay.say(frame(CONTINUATION, fin=False) * 100)
        await trio.sleep(0.5)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(too_long(b"HTTP/1.1 101 Switching Protocols\r\n"), id="a head without end"),
        pytest.param(
            too_long(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:22/\r\n"), id="a redirect without end"
        ),
        pytest.param(too_long(b"HTTP/1.1 200 OK\r\n\r\n"), id="a page without end"),
        pytest.param(too_long(b"HTTP/1.1 "), id="a status without end"),
        pytest.param(drips, id="a byte a second"),
        pytest.param(chatters, id="texts without end"),
        pytest.param(says_nothing_in_pieces, id="a text without end"),
    ],
)
async def test_an_endless_opening_is_bounded_in_time_and_size(
    engine: EngineName, autojump_clock: trio.testing.MockClock, attack: Attack
) -> None:
    hostile = HostileRelay(attack, engine)
    with at_most(4 * MIB):
        failure = await hostile.run()
    assert isinstance(failure, RelayConnectError)
    assert trio.current_time() <= 21
    assert not hostile.dialled


@pytest.mark.parametrize(
    "word",
    [
        challenge(version=int("9" * 4000)),
        challenge(version=1e300),
        challenge(version=True),
        challenge(relay="r" * 15_000),
        challenge(relay="\x00\n\x1b[2J"),
        challenge(relay=["r"]),
        challenge(nonce="A" * 15_000),
        challenge(nonce="\ud800"),
        challenge(nonce={}),
        challenge(type="welcome", session="s", public_url="u"),
        challenge(type="rejected", reason="\n" * 900, message="\x1b[31m" * 100, retry_after_ms=2**53),
        challenge(type=NESTED[:100]),
    ],
    ids=lambda word: re.sub(r"\W+", " ", json.dumps(word))[-60:],
)
async def test_an_absurd_first_word_is_a_failure_that_can_be_shown(
    engine: EngineName, autojump_clock: trio.testing.MockClock, word: dict[str, Any]
) -> None:
    async def attack(relay: RelayOfBytes) -> None:
        await relay.upgrade()
        await relay.say(text(word))
        await relay.read_frame()
        await relay.say(text({"type": "rejected", "reason": "busy"}))
        await relay.read_frame()

    failure = await HostileRelay(attack, engine).run()
    assert isinstance(failure, RelayConnectError)
    assert len(str(failure)) < 4500
    assert str(failure).isprintable()


async def test_a_visitor_that_comes_together_with_the_welcome_is_served(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    """Found by an attack: what came in one read with the welcome was lost, and the session with it."""

    async def greet(relay: RelayOfBytes) -> None:
        await relay.upgrade()
        await relay.say(text(challenge()))
        await relay.read_frame()
        await relay.say(text(WELCOME) + binaries(data(1, HEADER + b"at once", SYN)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            await relay.heard(1, body=b"at once")
            nursery.cancel_scope.cancel()

    hostile = HostileRelay(greet, engine)
    await hostile.run()
    assert hostile.dialled == [LOCAL]


# Nothing is compressed: a few bytes never become many


async def test_a_gateway_offers_no_compression_and_takes_none(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    async def attack(relay: RelayOfBytes) -> None:
        await relay.say(await relay.read_request(), b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
        await relay.read_frame()

    hostile = HostileRelay(attack, engine)
    failure = await hostile.run()
    assert isinstance(failure, RelayConnectError)
    assert b"extensions" not in hostile.relay.request.lower()


async def test_a_relay_agrees_to_no_compression_and_takes_none(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, engine=engine)
        gateway = GatewayOfBytes(await relay.dial("relay.test", 80))
        answer = await gateway.open(b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
        assert answer.startswith(b"HTTP/1.1 101")
        assert b"extensions" not in answer.lower()
        await gateway.say(frame(BINARY, b"x", masked=True, bits=RSV1))
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await until_it_raises(gateway.read_frame)
        nursery.cancel_scope.cancel()


# Only the local address


async def test_nothing_that_a_relay_says_names_where_the_gateway_connects_to(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    inside = Address("10.0.0.1", 22)
    headers = [ProxyHeader(inside, inside).encode(), ProxyHeader(Address("::1", 22), inside, tls=True).encode()]

    async def attack(relay: RelayOfBytes) -> None:
        await relay.upgrade()
        await relay.say(text(challenge(redirect="ws://10.0.0.1:22", local_addr="10.0.0.1:22")))
        await relay.read_frame()
        await relay.say(text(WELCOME | {"public_url": "http://10.0.0.1:22", "local_addr": "10.0.0.1:22"}))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.listen)
            await relay.say(text({"type": "connect", "to": "10.0.0.1:22"}))
            for number, header in enumerate(headers):
                said = b"CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: 10.0.0.1:22\r\n\r\n"
                await relay.say(binaries(data(2 * number + 1, header + said, SYN)))
                await relay.heard(2 * number + 1, body=said)
            nursery.cancel_scope.cancel()

    hostile = HostileRelay(attack, engine)
    await hostile.run()
    assert set(hostile.dialled) == {LOCAL}


# A hostile gateway at the relay's gateway endpoint

GATEWAY_FLOODS: Final[dict[str, bytes]] = {
    "openings": b"".join(update(2 * number + 2, SYN) for number in range(COUNT)),
    "openings with data": b"".join(data(2 * number + 2, b"x" * 50, SYN) for number in range(COUNT)),
    "pings": b"".join(map(ping_frame, range(COUNT))),
    "late resets": b"".join(update(2 * number + 2, SYN | RST) for number in range(COUNT)),
}


@pytest.mark.parametrize("flood", [*GATEWAY_FLOODS, "texts", "pieces of nothing"])
async def test_a_gateway_that_floods_its_relay_harms_itself_alone(
    engine: EngineName, autojump_clock: trio.testing.MockClock, flood: str
) -> None:
    other = RelayKey("ptk1_another-key-of-the-tests-0123456789")
    entry = tunnel_entry(id="home", url="http://home.test", key=str(other.identity().public_key))
    if flood == "texts":
        said = frame(TEXT, b'{"type":"weather"}', masked=True) * COUNT
    elif flood == "pieces of nothing":
        said = frame(BINARY, fin=False, masked=True) + frame(CONTINUATION, fin=False, masked=True) * 5 * COUNT
    else:
        said = frame(BINARY, GATEWAY_FLOODS[flood], masked=True)
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery, {"tunnels": [tunnel_entry(), entry]}, engine=engine)
        async with relay.tunnel("i", relay=f"ws://{RELAY_NAME}", key=other) as tunnel:
            await tunnel.wait_connected()
            nursery.start_soon(trio.serve_listeners, echo, [tunnel])
            hostile = GatewayOfBytes(await relay.dial(RELAY_NAME, 80))
            await hostile.open()
            before = living_tasks()
            with at_most(BUDGET):
                await hostile.say(said)
                await trio.sleep(1)
                visitor = await relay.visit()
                await visitor.send_all(request(host="home.test"))
                with trio.fail_after(5):
                    assert await visitor.receive_some() == request(host="home.test")
            assert living_tasks() <= before + 5
        nursery.cancel_scope.cancel()


# The transports of Pioneer Relay and rathole

CREATE: Final = encode_command(ControlCommand.CREATE_DATA_CHANNEL)


async def test_a_flood_of_commands_makes_so_many_connections_and_no_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    connections = 0

    async def dial(host: str, port: int) -> trio.abc.Stream:
        nonlocal connections
        connections += 1
        return await relay.dial(host, port)

    async with open_pioneer_relay(key=KEY, listen=False) as relay:
        before = living_tasks()
        async with open_tunnel("relay.test:2333", key=KEY, transport="tcp", dial=dial) as tunnel:
            await tunnel.wait_connected()
            with at_most(BUDGET):
                for _ in range(10):
                    relay.tell(CREATE * 2000)
                await trio.sleep(30)
            assert tunnel.status.state is State.CONNECTED
            assert connections == 1 + MOST_IDLE
            assert living_tasks() - before <= 2 * MOST_IDLE + 20


async def test_visitors_with_connections_of_their_own_are_bounded() -> None:
    """Found by an attack: as many as the relay liked, each with two descriptors, until the host had none left."""
    async with (
        open_pioneer_relay(key=KEY) as relay,
        open_tunnel(str(relay.address), key=KEY, transport="tcp", limits=Limits(streams=4)) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        visitors = []
        for _ in range(4):
            visitors.append(await relay.visit())
            await visitors[-1].send_all(b"x")
            assert await visitors[-1].receive_some() == b"x"
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            async with await relay.visit() as one_more:
                await read_all(one_more)
        await visitors[0].aclose()

        async def is_served() -> bool:
            with suppress(trio.BrokenResourceError):
                async with await relay.visit() as visitor:
                    return await ask(visitor, b"y") == b"y"
            return False

        await eventually(is_served)
        for visitor in visitors:
            await visitor.aclose()
