"""A whole relay on loopback: raw sockets as visitors and as gateways."""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from raw_gateways import ADDRESS, Overwhelmed, raw_gateway, status_of
from rig import (
    HOST,
    KEY,
    RELAY_NAME,
    RelayRig,
    ask,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
    until_it_raises,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import InvalidSettingsError, ReplacedError, StorageError, TunnelAuthError
from pioneer_tunnel._model.exception_groups import leaves
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._wire import messages
from pioneer_tunnel._wire.handshake import SUBPROTOCOL
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import Relay, TunnelEntry
from pioneer_tunnel.relay.gateways.endpoint import GatewayEndpoint
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import EngineName, Opening, WebSocketClosed, load_engine
from pioneer_tunnel.yamux.frames import ACK, RST, SYN, FrameType, encode_header


@asynccontextmanager
async def serving(engine: EngineName | None = None, **changes: Any) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    """A relay, and a gateway behind it that echoes."""
    async with relay_rig(engine, **changes) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            yield rig, tunnel


async def answer_to(rig: RelayRig, data: bytes) -> bytes:
    async with await rig.visit() as visitor:
        with no_hang():
            return await ask(visitor, data)


# What a visitor is told


async def test_an_unknown_host_is_404() -> None:
    async with serving() as (rig, _):
        answer = await answer_to(rig, request(host="nobody.test"))
    assert status_of(answer) == 404
    assert b"nobody" not in answer
    assert b"Connection: close" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: office.test\r\nHost: office.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: two words\r\n\r\n",
        b"GET http://home.test/ HTTP/1.1\r\nHost: office.test\r\n\r\n",
        b"GET / HTTP/1.1\nHost: office.test\n\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"GET / HTTP/1.1\r\nHost: office",
    ],
)
async def test_a_request_that_leaves_a_doubt_is_400(head: bytes) -> None:
    async with serving() as (rig, _):
        assert status_of(await answer_to(rig, head)) == 400


async def test_a_head_that_is_too_large_is_431_and_the_visitor_reads_so() -> None:
    """Also when the visitor keeps sending: a reset must not destroy the answer."""
    async with serving() as (rig, _):
        many = b"GET / HTTP/1.1\r\nHost: office.test\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 600 + b"\r\n"
        async with await rig.visit() as visitor, trio.open_nursery() as nursery:
            nursery.start_soon(visitor.send_all, many)
            with no_hang():
                assert status_of(await read_all(visitor)) == 431


async def test_a_visitor_without_a_word_is_told_nothing() -> None:
    async with serving() as (rig, _):
        assert await answer_to(rig, b"") == b""


async def test_a_gateway_that_is_not_connected_is_503() -> None:
    async with relay_rig() as rig:
        assert status_of(await answer_to(rig, request())) == 503


async def test_a_gateway_that_resets_before_it_answers_is_502() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            (await tunnel.accept()).reset()
            with no_hang():
                assert status_of(await read_all(visitor)) == 502


async def test_a_gateway_that_is_lost_after_it_began_to_answer_is_a_reset() -> None:
    """A part of an answer must never look like the whole of it."""
    async with relay_rig() as rig:
        async with rig.tunnel() as tunnel:
            await tunnel.wait_connected()
            visitor = await rig.visit()
            await visitor.send_all(request())
            stream = await tunnel.accept()
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
            await read_exactly(visitor, 26)
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()


async def test_a_relay_that_stops_in_the_middle_of_an_answer_resets_the_visitor() -> None:
    """The visitor used to get a FIN: when cancelled, the pump reset only one of its two streams."""
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            stream = await tunnel.accept()
            await stream.send_all(b"half of")
            await read_exactly(visitor, 7)
            await rig.stop()
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
        await rig.start()


async def test_a_slow_head_is_408_after_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        started = trio.current_time()
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        for byte in b"GET / HTTP":
            await visitor.send_all(bytes([byte]))
            await trio.sleep(0.9)
        assert status_of(await read_all(visitor)) == 408
        assert trio.current_time() - started == pytest.approx(10)


def is_without_body(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    return b"\r\nContent-Length: " in head and bool(end) and body == b""


HEAD: Final = request().replace(b"GET", b"HEAD")


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (HEAD.replace(b"office", b"nobody"), 404),
        (b"HEAD / HTTP/1.1\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: office", 400),
        (b"\r\nHEAD / HTTP/1.1\r\nX : y", 400),
        (HEAD.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 20_000), 431),
        (HEAD, 503),
    ],
)
async def test_what_a_head_request_is_told_has_no_body(asked: bytes, status: int) -> None:
    async with relay_rig() as rig:
        answer = await answer_to(rig, asked)
    assert status_of(answer) == status
    assert is_without_body(answer)


async def test_a_gateway_that_resets_before_it_answers_a_head_request_is_a_502_without_body() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(HEAD)
            (await tunnel.accept()).reset()
            with no_hang():
                answer = await read_all(visitor)
    assert status_of(answer) == 502
    assert is_without_body(answer)


async def test_a_head_request_to_the_gateway_endpoint_is_answered_without_body() -> None:
    async with relay_rig() as rig, await connect(rig.addresses.control) as visitor:
        answer = await ask(visitor, HEAD)
    assert status_of(answer) == 404
    assert is_without_body(answer)


async def test_a_head_request_that_is_slow_is_a_408_without_body(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(HEAD[:-1])
        answer = await read_all(visitor)
    assert status_of(answer) == 408
    assert is_without_body(answer)


async def test_a_gateway_that_takes_no_stream_is_504(autojump_clock: trio.testing.MockClock) -> None:
    directory = LocalDirectory()
    await directory.enter("office", Overwhelmed())
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        assert status_of(await ask(visitor, request())) == 504
        assert trio.current_time() == pytest.approx(10)


async def test_a_refused_visitor_that_neither_reads_nor_ends_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(request())
    assert trio.current_time() <= 12


async def test_who_wants_what_there_is_not_still_makes_way_for_others(autojump_clock: trio.testing.MockClock) -> None:
    settled: list[str] = []
    for host in ("nobody.test", HOST):
        ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), LocalDirectory())
        visitor, stream = trio.testing.memory_stream_pair()
        settle = functools.partial(settled.append, host)
        async with trio.open_nursery() as nursery:
            visit = Visit(stream=stream, visitor=None, local=None, tls=False, settle=settle)
            nursery.start_soon(ingress.serve, visit)
            assert status_of(await ask(visitor, request(host=host))) == (404 if host == "nobody.test" else 503)
    assert settled == [HOST]


# Whom a request is for


@pytest.mark.parametrize("host", ["office.test", "OFFICE.test", "office.test.", "office.test:8080", "Office.Test.:1"])
async def test_the_host_is_compared_without_case_port_and_trailing_dot(host: str) -> None:
    async with serving() as (rig, _):
        assert await answer_to(rig, request(host=host)) == request(host=host)


@pytest.mark.parametrize("host", ["office.test.evil", "xoffice.test", "office", "127.0.0.1", RELAY_NAME])
async def test_no_other_host_will_do(host: str) -> None:
    async with serving() as (rig, _):
        assert status_of(await answer_to(rig, request(host=host))) == 404


async def test_every_byte_passes_as_it_came() -> None:
    """The head is not rewritten: odd spacing, case and order stay, and so does what follows."""
    odd = (
        b"gEt /%7Ea?b=%zz HTTP/1.1\r\nX-B:   spaces \t \r\nhOsT: \t Office.TEST:80 \r\nx-b:\r\nA: \xe9\r\n"
        b"Content-Length: 3\r\n\r\nabcPUT /second HTTP/1.1\r\nhost:office.test\r\nContent-Length: 25600\r\n\r\n"
    ) + bytes(range(256)) * 100
    async with serving() as (rig, _):
        assert await answer_to(rig, odd) == odd


async def test_a_head_in_single_bytes_is_the_same_head() -> None:
    async with serving() as (rig, _), await rig.visit() as visitor:
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request():
            await visitor.send_all(bytes([byte]))
            await trio.sleep(0)
        await visitor.send_eof()
        with no_hang():
            assert await read_all(visitor) == request()


async def test_each_host_has_its_own_tunnel() -> None:
    other = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
    tunnels = [
        tunnel_entry(),
        {"id": "home", "url": "https://home.test:8443", "key": str(other.identity().public_key)},
    ]

    async def say(name: bytes, tunnel: Tunnel) -> None:
        while True:
            async with await tunnel.accept() as stream:
                await stream.send_all(name)

    async with (
        relay_rig(tunnels=tunnels) as rig,
        rig.tunnel() as office,
        rig.tunnel(key=other) as home,
        in_background(lambda: say(b"office", office), lambda: say(b"home", home)),
    ):
        await office.wait_connected()
        await home.wait_connected()
        assert home.public_url == "https://home.test:8443"
        for host in ("office", "home", "office", "home"):
            async with await rig.visit() as visitor:
                await visitor.send_all(request(host=f"{host}.test"))
                assert await read_all(visitor) == host.encode()


async def test_a_tunnel_with_an_address_of_its_own_carries_anything() -> None:
    async with serving(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as (rig, _):
        own = rig.addresses.tunnels["office"]
        for said in (b"SSH-2.0-anything\r\n", bytes(range(256)), b""):
            async with await connect(own) as visitor:
                with no_hang():
                    assert await ask(visitor, said) == said
        assert status_of(await answer_to(rig, request())) == 404, "it is not found by its host as well"


async def test_without_its_gateway_such_an_address_resets() -> None:
    async with (
        relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as rig,
        await connect(rig.addresses.tunnels["office"]) as visitor,
    ):
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await ask(visitor, b"anyone?")


async def test_a_visitor_that_resets_resets_the_stream() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor = await rig.visit()
        await visitor.send_all(request())
        stream = await tunnel.accept()
        await read_exactly(stream, len(request()))
        await abandon(visitor)
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


# Where gateways connect


async def test_the_gateway_endpoint_has_nothing_for_visitors() -> None:
    async with serving() as (rig, _), await connect(rig.addresses.control) as visitor:
        assert status_of(await ask(visitor, request())) == 404


async def test_an_upgrade_without_our_subprotocol_is_404() -> None:
    upgrade = request(
        "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol: chat",
    )  # fmt: skip
    async with serving() as (rig, _), await connect(rig.addresses.control) as visitor:
        assert status_of(await ask(visitor, upgrade)) == 404


@pytest.mark.parametrize(("version", "key"), [("12", "dGhlIHNhbXBsZSBub25jZQ=="), ("13", None)], ids=str)
async def test_a_crooked_websocket_opening_is_refused(engine: EngineName, version: str, key: str | None) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Version: {version}"]
    lines += [f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"] + ([] if key is None else [f"Sec-WebSocket-Key: {key}"])
    async with relay_rig(engine) as rig, await connect(rig.addresses.control) as visitor:
        await visitor.send_all(request(*lines))
        with no_hang():
            assert 400 <= status_of(await read_all(visitor)) < 500


async def test_one_address_serves_gateways_and_visitors(engine: EngineName) -> None:
    one = "localhost:0"
    async with serving(engine, control_addr=one, ingress_addr=one) as (rig, _):
        assert rig.addresses.control == rig.addresses.ingress
        assert await answer_to(rig, request()) == request()
        assert status_of(await answer_to(rig, request(host="nobody.test"))) == 404
        # An upgrade to our protocol, but not on a public name, is a visitor's.
        upgrade = request(
            "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"
        )  # fmt: skip
        assert await answer_to(rig, upgrade) == upgrade
        # Nor is a host that can be no name a public one.
        assert status_of(await answer_to(rig, upgrade.replace(HOST.encode(), b"-.test"))) in {400, 404}


async def test_the_newest_session_wins(engine: EngineName) -> None:
    """The old one gets the name of its successor, a go-away and close code 4001; the new one keeps the tunnel."""
    async with relay_rig(engine) as rig, raw_gateway(rig) as (old, _), rig.tunnel(instance="the-new-one") as tunnel:
        await tunnel.wait_connected()
        texts, data = [], bytearray()

        async def take() -> None:
            for message in await old.receive():
                if isinstance(message, str):
                    texts.append(message)
                else:
                    data.extend(message)

        with no_hang(), pytest.raises(WebSocketClosed) as closed:
            await until_it_raises(take)
        assert closed.value.code == 4001
        (text,) = texts
        notice = messages.parse_notice(text)
        assert isinstance(notice, messages.Replaced)
        assert notice.by == "the-new-one"
        assert data.endswith(encode_header(FrameType.GO_AWAY, 0, 0, 0))
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            assert await answer_to(rig, request()) == request()


async def test_a_gateway_that_another_one_replaces_gives_up(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, rig.tunnel(instance="first") as tunnel:
        await tunnel.wait_connected()
        async with raw_gateway(rig, instance="second"):
            with no_hang(), pytest.raises(ReplacedError, match="'second'"):
                await tunnel.accept()


async def test_a_session_that_leaves_late_does_not_take_its_successor_along() -> None:
    directory = LocalDirectory()
    replaced: list[str] = []

    class Old(Overwhelmed):
        def replace(self, by: str) -> None:
            replaced.append(by)

    old, new = Old(), Overwhelmed()
    await directory.enter("office", old)
    await directory.enter("office", new)
    await directory.leave("office", old)
    assert await directory.find("office") is new
    assert replaced == ["overwhelmed"]
    await directory.leave("office", new)
    assert await directory.find("office") is None


async def test_a_gateways_own_stream_is_reset(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, raw_gateway(rig) as (websocket, _):
        await websocket.send([encode_header(FrameType.WINDOW_UPDATE, SYN, 2, 0)])
        received = b""
        with no_hang():
            while encode_header(FrameType.WINDOW_UPDATE, RST, 2, 0) not in received:
                for message in await websocket.receive():
                    assert not isinstance(message, str)
                    received += message


async def test_a_stream_begins_with_a_header_that_names_the_visitor(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, raw_gateway(rig) as (websocket, _), await rig.visit() as visitor:
        await visitor.send_all(request())
        received = b""
        with no_hang():
            while not received.endswith(request()):
                for message in await websocket.receive():
                    assert not isinstance(message, str)
                    received += message
        header = ProxyHeader(
            visitor=Address(*visitor.socket.getsockname()), local=Address(*visitor.socket.getpeername()), tls=False
        )
        assert received.partition(header.encode())[1]
        # Accepted, answered and ended, by hand.
        await websocket.send([encode_header(FrameType.WINDOW_UPDATE, ACK, 1, 0)])


async def test_a_wrong_key_and_an_unknown_one_are_refused_alike(engine: EngineName) -> None:
    unknown = RelayKey("ptk1_nobody-has-ever-heard-of-this-key")
    said = []
    async with relay_rig(engine) as rig:
        with pytest.raises(TunnelAuthError) as refused:
            async with raw_gateway(rig, unknown):
                pass
        said.append(str(refused.value))

        class Impostor:
            """Names a registered key and signs with another one."""

            key_id = KEY.identity().key_id
            public_key = KEY.identity().public_key

            def sign(self, message: bytes) -> bytes:
                return unknown.identity().sign(message)

        class ImpostorKey:
            def identity(self) -> Impostor:
                return Impostor()

        with pytest.raises(TunnelAuthError) as refused:
            async with raw_gateway(rig, ImpostorKey()):  # type: ignore[arg-type]
                pass
        said.append(str(refused.value))
    assert said[0] == said[1]


async def test_a_name_that_the_relay_does_not_go_by_is_refused(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        with pytest.raises(InvalidSettingsError, match=f"'wrong.test'.*{RELAY_NAME}"):
            async with raw_gateway(rig, audience="wrong.test"):
                pass


async def test_a_service_that_the_registry_does_not_have_is_refused(engine: EngineName) -> None:
    async with relay_rig(engine, tunnels=[tunnel_entry(service="printer")]) as rig:
        with pytest.raises(InvalidSettingsError, match=r"'scanner'.*'printer'"):
            async with raw_gateway(rig, service="scanner"):
                pass
        async with raw_gateway(rig, service="printer"):
            pass


@pytest.mark.parametrize("whole", [False, True], ids=["the seed alone", "all that new-identity prints"])
async def test_a_relay_with_an_identity_proves_it(tmp_path: Path, whole: bool) -> None:
    seed = bytes(range(32))
    identity = SigningIdentity.from_seed(seed).public_key
    (tmp_path / "identity").write_text(f"{seed.hex()}\n" + f"{identity}\n" * whole)
    (tmp_path / "identity").chmod(0o600)
    async with relay_rig(identity_key_file="identity", base_dir=tmp_path) as rig:
        async with rig.tunnel(relay_identity=identity) as tunnel:
            with no_hang():
                await tunnel.wait_connected()
        async with rig.tunnel(relay_identity=KEY.identity().public_key) as tunnel:
            await eventually(lambda: tunnel.status.state is State.FAILED)
            assert "pinned" in (tunnel.status.message or "")


@pytest.mark.parametrize("written", ["", "no hexadecimal", bytes(31).hex(), "\N{SNOWMAN}"])
async def test_an_identity_file_that_holds_no_seed_is_named_without_what_it_holds(tmp_path: Path, written: str) -> None:
    (tmp_path / "identity").write_text(written)
    (tmp_path / "identity").chmod(0o600)
    with pytest.raises(ExceptionGroup) as raised:
        async with relay_rig(identity_key_file="identity", base_dir=tmp_path):
            pass
    (error,) = leaves(raised.value)
    assert str(tmp_path / "identity") in str(error)
    assert not written or written not in str(error)


async def test_a_gateway_that_does_not_prove_itself_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    for engine in (None, "trio-websocket"):
        started = trio.current_time()
        endpoint = GatewayEndpoint(relay_config(), LocalRegistry([]), LocalDirectory(), engine=engine)
        ours, theirs = trio.testing.memory_stream_pair()
        watched = watch(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.serve_request, watched, watched)
            async with load_engine().connect(ours, Opening(subprotocol=SUBPROTOCOL, address=ADDRESS)) as websocket:
                await websocket.receive()  # the challenge, and then silence
                with pytest.raises(trio.BrokenResourceError):
                    await websocket.receive()
        assert 10 <= trio.current_time() - started <= 12


async def test_binary_before_the_welcome_closes_with_1002(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        stream = await connect(rig.addresses.control)
        async with load_engine().connect(stream, Opening(subprotocol=SUBPROTOCOL, address=ADDRESS)) as websocket:
            await websocket.receive()
            await websocket.send([b"\0" * 12])
            with no_hang(), pytest.raises(WebSocketClosed) as closed:
                await websocket.receive()
            assert closed.value.code == 1002


@pytest.mark.parametrize(
    "text", ["{", '{"type":"authenticate"}', '{"type":"authenticate","key_id":7}', "[" * 16000, '"x"']
)
async def test_nonsense_before_the_welcome_closes_with_1002(engine: EngineName, text: str) -> None:
    async with relay_rig(engine) as rig:
        stream = await connect(rig.addresses.control)
        async with load_engine().connect(stream, Opening(subprotocol=SUBPROTOCOL, address=ADDRESS)) as websocket:
            await websocket.receive()
            await websocket.send([text])
            with no_hang(), pytest.raises(WebSocketClosed) as closed:
                await websocket.receive()
            assert closed.value.code == 1002


async def test_a_relay_that_stops_says_so_with_1001(engine: EngineName) -> None:
    async with relay_rig(engine) as rig, raw_gateway(rig) as (websocket, _), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def listen() -> None:
            with no_hang(), pytest.raises(WebSocketClosed) as closed:
                await until_it_raises(websocket.receive)
            assert closed.value.code == 1001

        await trio.testing.wait_all_tasks_blocked()
        await rig.stop()
        await rig.start()


async def test_a_relay_that_stops_leaves_nothing_behind(engine: EngineName) -> None:
    with nothing_left_behind():
        async with serving(engine) as (rig, _):
            visitors = [await rig.visit() for _ in range(5)]
            for visitor in visitors[:3]:
                await visitor.send_all(request())
                await read_exactly(visitor, len(request()))
            await rig.stop()
            for visitor in visitors:
                await visitor.aclose()
            await rig.start()


async def test_nothing_secret_is_logged(
    engine: EngineName, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    token = "Bearer of-a-secret-0123456789"
    async with serving(engine) as (rig, tunnel):
        assert await answer_to(rig, request(f"Authorization: {token}")) == request(f"Authorization: {token}")
        assert status_of(await answer_to(rig, request(f"Authorization: {token}", host="no.test"))) == 404
        shown = repr((rig.config, tunnel, tunnel.status, tunnel.history))
        with pytest.raises(TunnelAuthError):
            async with raw_gateway(rig, RelayKey("ptk1_another-secret-that-is-wrong")):
                pass
    told = "\n".join([shown, caplog.text, *(str(vars(record)) for record in caplog.records), *capfd.readouterr()])
    for secret in (KEY.reveal(), token, "another-secret", '"proof"'):
        assert secret not in told
    assert "is connected" in caplog.text


def test_an_identity_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        Relay(relay_config(identity_key_file="nowhere", base_dir=tmp_path))
    (tmp_path / "short").write_text("abcd")
    (tmp_path / "short").chmod(0o640)
    with pytest.raises(StorageError, match=r"short .*\(mode 0640\); run: chmod 600 "):
        Relay(relay_config(identity_key_file="short", base_dir=tmp_path))
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(InvalidSettingsError, match=r"short.* first line; .*new-identity"):
        Relay(relay_config(identity_key_file="short", base_dir=tmp_path))


async def test_an_address_that_is_taken_is_an_error() -> None:
    async with relay_rig() as rig:
        taken = relay_config(control_addr=str(rig.addresses.control))
        with pytest.raises(OSError, match="in use"):
            await Relay(taken).serve()
