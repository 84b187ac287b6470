"""A running relay reloads its file: what stays is not interrupted, and a broken file changes nothing."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from gateway import in_virtual_time
from programs import Program, running
from raw_gateways import raw_gateway, status_of
from rig import (
    AT_ONCE,
    KEY,
    RelayRig,
    ask,
    connect,
    echo,
    eventually,
    free_port,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    rejected,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
    until_it_raises,
    upload,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import InvalidSettingsError, ReplacedError, TunnelAuthError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State
from pioneer_tunnel.cli.signals import received
from pioneer_tunnel.relay import Relay, RelayConfig, TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalRegistry
from pioneer_tunnel.relay.reload import Changes, ConfigFile, follow
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

HOME_KEY: Final = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
NEW_KEY: Final = RelayKey("ptk1_the-next-key-of-the-tests-0123456789")


def public(key: RelayKey) -> str:
    return str(key.identity().public_key)


def home(**changes: Any) -> dict[str, Any]:
    return {"id": "home", "url": "http://home.test", "key": public(HOME_KEY)} | changes


# Relay.apply


@asynccontextmanager
async def carrying(rig: RelayRig, **changes: Any) -> AsyncIterator[trio.SocketStream]:
    """A gateway that echoes, and a visitor in the middle of a conversation. Both must stay to the end."""
    async with rig.tunnel(**changes) as tunnel:
        await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])), await rig.visit() as visitor:
            await visitor.send_all(upload())
            await read_exactly(visitor, len(upload()))
            yield visitor
            await visitor.send_all(b"still here?")
            with no_hang():
                assert await read_exactly(visitor, 11) == b"still here?"
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_a_tunnel_that_is_new_works_at_once_and_the_others_are_not_touched() -> None:
    async with relay_rig() as rig, carrying(rig):
        with pytest.raises(TunnelAuthError):
            async with raw_gateway(rig, HOME_KEY):
                pass
        await rig.apply(tunnels=[tunnel_entry(), home(bind_addr="127.0.0.1:0")])
        async with rig.tunnel(key=HOME_KEY) as tunnel, in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            await tunnel.wait_connected()
            async with await connect(rig.addresses.tunnels["home"]) as visitor:
                assert await ask(visitor, b"anything") == b"anything"


async def test_a_tunnel_that_is_gone_ends() -> None:
    async with (
        relay_rig(tunnels=[tunnel_entry(), home(bind_addr="127.0.0.1:0")]) as rig,
        carrying(rig),
        rig.tunnel(key=HOME_KEY) as tunnel,
    ):
        await tunnel.wait_connected()
        address = rig.addresses.tunnels["home"]
        async with await connect(address) as visitor:
            await visitor.send_all(b"anyone?")
            stream = await tunnel.accept()
            await stream.send_all(b"half of")
            await read_exactly(visitor, 7)
            await rig.apply(tunnels=[tunnel_entry()])
            assert rig.addresses.tunnels == {}
            with pytest.raises(ConnectionRefusedError):
                await connect(address)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            with no_hang():
                await rejected(tunnel)


async def test_what_has_changed_of_a_tunnel_counts_for_what_comes_next() -> None:
    async with relay_rig(tunnels=[tunnel_entry(), home()]) as rig, carrying(rig):
        await rig.apply(tunnels=[tunnel_entry(url="http://moved.test"), home(service="printer")])
        async with await rig.visit() as visitor:
            assert status_of(await ask(visitor, upload())) == 404
        async with await rig.visit() as visitor:
            assert await ask(visitor, request(host="moved.test")) == request(host="moved.test")
        with pytest.raises(InvalidSettingsError, match="'printer'"):
            async with raw_gateway(rig, HOME_KEY):
                pass
        async with rig.tunnel(key=HOME_KEY, service="printer") as first:
            await first.wait_connected()
            await rig.apply(tunnels=[tunnel_entry(url="http://moved.test"), home(takeover="first")])
            async with rig.tunnel(key=HOME_KEY) as second:
                await eventually(lambda: "has this tunnel" in (second.status.message or ""))
                assert first.status.state is State.CONNECTED


async def test_an_address_can_go_from_one_tunnel_to_another() -> None:
    bind_addr = f"127.0.0.1:{free_port()}"
    async with (
        relay_rig(tunnels=[tunnel_entry(bind_addr=bind_addr), home()]) as rig,
        rig.tunnel(key=HOME_KEY) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        await rig.apply(tunnels=[tunnel_entry(), home(bind_addr=bind_addr)])
        async with await connect(Address.parse(bind_addr)) as visitor:
            assert await ask(visitor, b"at home?") == b"at home?"
        await rig.apply(tunnels=[home()])
        await rig.apply(tunnels=[home(bind_addr=bind_addr)])
        async with await connect(Address.parse(bind_addr)) as visitor:
            assert await ask(visitor, b"again?") == b"again?"


async def test_what_cannot_be_done_changes_nothing() -> None:
    async with relay_rig() as rig, carrying(rig):
        before, addresses = rig.config, rig.addresses
        taken = str(rig.addresses.ingress)
        with pytest.raises(OSError, match=f"cannot listen at {taken.replace('localhost', '127.0.0.1')}"):
            await rig.apply(
                tunnels=[
                    home(bind_addr="127.0.0.1:0"),
                    tunnel_entry(bind_addr=taken.replace("localhost", "127.0.0.1")),
                ]
            )
        with pytest.raises(TunnelAuthError):
            async with raw_gateway(rig, HOME_KEY):
                pass
        rig.config = before
        await rig.apply()
        assert rig.addresses == addresses


async def test_a_tunnel_does_not_get_an_address_that_the_relay_has_until_it_is_restarted() -> None:
    control = f"127.0.0.1:{free_port()}"
    async with relay_rig(control_addr=control) as rig:
        moved = relay_config(control_addr="127.0.0.1:0", tunnels=[tunnel_entry(bind_addr=control)])
        with pytest.raises(InvalidSettingsError, match="control_addr"):
            await rig.relay.apply(moved)


async def test_what_takes_a_restart_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with relay_rig() as rig:
        await rig.apply(public_names=["other.test"], heartbeat_ms=20_000, tunnels=[tunnel_entry(), home()])
        assert "added 'home'" in caplog.text
        assert "take a restart: public_names, heartbeat_ms" in caplog.text
        async with raw_gateway(rig):  # by the old name
            pass


async def test_only_a_relay_that_serves_can_be_changed() -> None:
    relay = Relay(relay_config())
    with pytest.raises(RuntimeError, match="does not serve"):
        await relay.apply(relay_config())


async def test_sessions_are_held_against_a_registry_of_the_hosts_own() -> None:
    registry = LocalRegistry([TunnelEntry(**tunnel_entry())])
    relay = Relay(relay_config(), registry=registry)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(relay.serve)

        async def dial(host: str, port: int) -> trio.SocketStream:
            return await connect(addresses.control)

        async with open_tunnel("ws://relay.test", key=KEY, dial=dial, restart=AT_ONCE) as tunnel:
            await tunnel.wait_connected()
            registry.replace([])
            await relay.apply(relay_config())
            with no_hang():
                await rejected(tunnel)
        nursery.cancel_scope.cancel()


def test_changes_are_told_by_tunnel() -> None:
    before = relay_config(tunnels=[tunnel_entry(), home()])
    assert str(Changes.between(before, before)) == "none"
    after = relay_config(tunnels=[home(url="http://moved.test"), tunnel_entry(id="shop", url="http://shop.test")])
    changes = Changes.between(before, attrs.evolve(after, id="relay-2"))
    assert str(changes) == "added 'shop', removed 'office', changed 'home'"
    assert changes.for_a_restart == ("id",)


# The file


def write(path: Path, *tunnels: dict[str, Any], **relay: Any) -> None:
    """Write a relay's file beside `path`, and rename it to `path`."""
    fields = {
        "control_addr": "127.0.0.1:0",
        "ingress_addr": "127.0.0.1:0",
        "id": "relay-of-the-tests",
        "public_names": ["relay.test"],
    } | relay
    lines = ["[relay]", *(f"{name} = {value!r}" for name, value in fields.items())]
    for tunnel in tunnels:
        lines += ["[[relay.tunnels]]", *(f"{name} = {value!r}" for name, value in tunnel.items())]
    beside = path.with_suffix(".new")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigFile:
    """A loaded file, with a short settling time."""
    monkeypatch.setattr("pioneer_tunnel.relay.reload.SETTLE_INTERVAL", 0.03)
    write(tmp_path / "relay.toml", tunnel_entry())
    file = ConfigFile(tmp_path / "relay.toml")
    file.load()
    return file


@asynccontextmanager
async def followed(file: ConfigFile, **options: Any) -> AsyncIterator[list[RelayConfig]]:
    """What was applied so far, while `file` is followed."""
    applied: list[RelayConfig] = []

    async def apply(config: RelayConfig) -> None:
        await trio.lowlevel.checkpoint()
        applied.append(config)

    async with in_background(partial(follow, file, apply, **({"interval": 0.01} | options))):
        yield applied


def has(applied: list[RelayConfig], number: int) -> bool:
    return len(applied) == number


@in_virtual_time
async def test_a_file_is_applied_when_it_has_changed_and_only_then(file: ConfigFile) -> None:
    async with followed(file) as applied:
        await trio.sleep(0.1)
        assert applied == []
        for number in range(1, 4):
            write(file.path, *[home(), tunnel_entry()][: number % 2 + 1])
            await eventually(partial(has, applied, number))
            assert [entry.id for entry in applied[-1].tunnels] == ["home", "office"][: number % 2 + 1]
        await trio.sleep(0.1)
        assert len(applied) == 3


@in_virtual_time
async def test_a_change_of_the_same_size_in_place_is_seen(file: ConfigFile) -> None:
    async with followed(file) as applied:
        text = file.path.read_text()
        file.path.write_text(text.replace("office", "oFFice"))
        await eventually(lambda: len(applied) == 1)


@in_virtual_time
async def test_a_file_that_is_being_written_is_not_read_half(file: ConfigFile) -> None:
    """The first half would be a valid file with fewer tunnels."""
    write(file.path, tunnel_entry(), home())
    file.load()
    text = file.path.read_text()
    half = text[: text.rindex("[[relay")]
    async with followed(file) as applied:
        for _ in range(10):
            with file.path.open("w") as writing:
                writing.write(half)
                writing.flush()
                await trio.sleep(0.015)
                writing.write(text[len(half) :])
            await trio.sleep(0.015)
        await eventually(lambda: bool(applied))
        assert {len(config.tunnels) for config in applied} == {2}


@in_virtual_time
async def test_a_broken_file_changes_nothing_and_is_told_once(
    file: ConfigFile, caplog: pytest.LogCaptureFixture
) -> None:
    def errors() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]

    async with followed(file) as applied:
        write(file.path, home(url="no url", key="no key"), tunnel_entry(id=""))
        await eventually(lambda: bool(errors()))
        await trio.sleep(0.1)
        [error] = errors()
        for told in (str(file.path), "tunnels[0].url", "tunnels[0].key", "tunnels[1].id"):
            assert told in error
        file.path.unlink()
        await eventually(lambda: len(errors()) == 2)
        assert "cannot be read" in errors()[1]
        await trio.sleep(0.1)
        assert (len(errors()), applied) == (2, [])
        write(file.path, home())
        await eventually(lambda: len(applied) == 1)


@in_virtual_time
async def test_what_cannot_be_applied_is_told_and_the_next_one_may_be(
    file: ConfigFile, caplog: pytest.LogCaptureFixture
) -> None:
    applied = []

    async def apply(config: RelayConfig) -> None:
        await trio.lowlevel.checkpoint()
        applied.append(config)
        if len(applied) == 1:
            raise OSError("cannot listen at 127.0.0.1:1: that is taken")

    async with in_background(partial(follow, file, apply, interval=0.01)):
        write(file.path, home())
        await eventually(lambda: "that is taken" in caplog.text)
        write(file.path, tunnel_entry())
        await eventually(lambda: len(applied) == 2)


@in_virtual_time
async def test_whoever_asks_has_it_read_at_once(file: ConfigFile) -> None:
    ask_for_it, asked = trio.open_memory_channel[None](1)
    async with followed(file, reload_now=asked, interval=1000) as applied:
        for number in (1, 2):
            await ask_for_it.send(None)
            await eventually(partial(has, applied, number))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
async def test_a_hangup_asks_for_it() -> None:
    with received("SIGHUP") as asked:
        assert asked is not None
        signal.raise_signal(signal.SIGHUP)
        with no_hang():
            await anext(asked)


# The whole: the program, two gateways, and a visitor who notices nothing


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Program, Path, dict[str, Any]]]:
    """A relay in a process of its own, its file, and what its file says of the relay itself."""
    control, ingress = free_port(), free_port()
    relay = {
        "control_addr": f"127.0.0.1:{control}",
        "ingress_addr": f"127.0.0.1:{ingress}",
        "public_names": [f"127.0.0.1:{control}"],
    }
    path = tmp_path / "relay.toml"
    write(path, tunnel_entry(), **relay)
    with running("relay", "--config", path) as process:
        process.wait_for("gateways at")
        yield process, path, relay
        assert process.interrupt(signal.SIGTERM) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
async def test_a_key_is_changed_and_not_a_byte_is_lost(program: tuple[Program, Path, dict[str, Any]]) -> None:
    process, path, relay = program
    address, ingress = f"ws://{relay['control_addr']}", Address.parse(relay["ingress_addr"])

    async def said(pattern: str) -> None:
        await trio.to_thread.run_sync(process.wait_for, pattern)

    async def visit() -> trio.SocketStream:
        visitor = await connect(ingress)
        await visitor.send_all(upload())
        assert await read_exactly(visitor, len(upload())) == upload()
        return visitor

    sent = received = 0
    ending = trio.Event()

    async def talk(visitor: trio.SocketStream) -> None:
        nonlocal sent
        while not ending.is_set():
            await visitor.send_all(bytes((sent + index) % 251 for index in range(1000)))
            sent += 1000
            await trio.sleep(0.002)
        await visitor.send_eof()

    async def listen(visitor: trio.SocketStream) -> None:
        nonlocal received
        while data := await visitor.receive_some():
            assert data == bytes((received + index) % 251 for index in range(len(data)))
            received += len(data)

    async with (
        open_tunnel(address, key=KEY, instance="old", restart=AT_ONCE) as old,
        in_background(lambda: serve_until_replaced(old)),
    ):
        await old.wait_connected()
        async with await visit() as visitor, trio.open_nursery() as nursery:
            nursery.start_soon(talk, visitor)
            nursery.start_soon(listen, visitor)
            both = tunnel_entry(keys=[public(KEY), public(NEW_KEY)])
            del both["key"]
            write(path, both, **relay)
            process.process.send_signal(signal.SIGHUP)
            await said("changes of tunnels: changed 'office'")
            async with (
                open_tunnel(address, key=NEW_KEY, instance="new", restart=AT_ONCE) as new,
                in_background(lambda: trio.serve_listeners(echo, [new])),
            ):
                await new.wait_connected()
                before = received
                async with await visit() as newcomer:
                    await eventually(lambda: received > before + 20_000)
                    assert old.status.state is State.CONNECTED, "its visitor is still talking"
                    ending.set()
                    await eventually(lambda: old.status.state is State.FAILED)
                    assert received == sent > 20_000
                    # Now the old key goes, by the file alone.
                    write(path, tunnel_entry(key=public(NEW_KEY)), **relay)
                    await said("changes of tunnels: changed 'office'[^$]*changes of tunnels: changed 'office'")
                    async with open_tunnel(address, key=KEY, restart=AT_ONCE) as refused:
                        with no_hang(), pytest.raises(TunnelAuthError):
                            await refused.wait_connected()
                    path.write_text("[relay]\nid = 3\n[[relay.tunnels]]\nurl = 'x'\n")
                    process.process.send_signal(signal.SIGHUP)
                    await said("is not applied")
                    assert "tunnels[0].url" in process.errors
                    await newcomer.send_all(b"all the same")
                    assert await read_exactly(newcomer, 12) == b"all the same"
                assert {status.state for status in new.history} == {State.STARTING, State.CONNECTED}


async def serve_until_replaced(tunnel: Tunnel) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(ReplacedError):
            await until_it_raises(lambda: echo_next(tunnel, nursery))


async def echo_next(tunnel: Tunnel, nursery: trio.Nursery) -> None:
    nursery.start_soon(echo, await tunnel.accept())
