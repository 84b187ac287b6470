"""A whole relay on loopback, as gateways see it: where they connect, who is refused, and how it stops."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
import trio.testing
from raw_gateways import ADDRESS, Overwhelmed, raw_gateway, status_of
from rig import (
    HOST,
    KEY,
    RELAY_NAME,
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
from serving_relay import answer_to, serving

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import InvalidSettingsError, ReplacedError, StorageError, TunnelAuthError
from pioneer_tunnel._model.exception_groups import leaves
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._wire import messages
from pioneer_tunnel._wire.handshake import SUBPROTOCOL
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.relay.gateways.endpoint import GatewayEndpoint
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.websocket import EngineName, Opening, WebSocketClosed, load_engine
from pioneer_tunnel.yamux.frames import ACK, RST, SYN, FrameType, encode_header


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
