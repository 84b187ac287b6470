"""A path that is dead is noticed and left: after a check, after a change of the network, and by the heartbeat."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, Final, final

import pytest
import trio
from memory_relay import MemoryRelay
from rig import HOST, request
from trio.testing import MockClock

from pioneer_tunnel._model.status import State
from pioneer_tunnel.tunnel.tunnel import Tunnel


@final
class Network:
    """A `WatchNetwork` of a test."""

    def __init__(self) -> None:
        self.changed: Callable[[str], object] | None = None
        self.known: Callable[[], Collection[str]] | None = None

    async def __call__(self, changed: Callable[[str], object], relay_addresses: Callable[[], Collection[str]]) -> None:
        self.changed, self.known = changed, relay_addresses
        await trio.sleep_forever()

    def change(self) -> None:
        assert self.changed is not None
        self.changed("the network has changed")


@asynccontextmanager
async def connected(**changes: Any) -> AsyncIterator[tuple[MemoryRelay, Tunnel]]:
    """A tunnel that is up, and was for a while."""
    async with trio.open_nursery() as nursery:
        relay = MemoryRelay(nursery)
        async with relay.tunnel("one", **changes) as tunnel:
            await tunnel.wait_connected()
            await trio.sleep(100)
            yield relay, tunnel
        nursery.cancel_scope.cancel()


async def until(tunnel: Tunnel, state: State) -> float:
    """Wait for a state; returns the seconds that it took."""
    started = trio.current_time()
    async for status in tunnel.watch():
        if status.state is state:
            break
    return trio.current_time() - started


GOODBYE: Final = 1.0
"""Seconds that the end of a session may take, if its connection takes no bytes."""


@pytest.mark.parametrize("how", ["retry_now", "network"])
async def test_a_check_of_a_dead_path_leads_to_another_link_in_2_seconds(autojump_clock: MockClock, how: str) -> None:
    network = Network()
    async with connected(watch_network=network) as (relay, tunnel):
        relay.cables[0].pull()
        if how == "network":
            network.change()
        else:
            tunnel.retry_now()
        assert 2 <= await until(tunnel, State.RECONNECTING) <= 2 + GOODBYE
        assert await until(tunnel, State.CONNECTED) < 0.5
        assert "did not answer a check" in str(tunnel.history)


async def test_a_check_of_a_path_that_lives_costs_nothing(autojump_clock: MockClock) -> None:
    network = Network()
    async with connected(watch_network=network) as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(request())
        stream = await tunnel.accept()
        assert HOST.encode() in await stream.receive_some()
        for _ in range(10):
            tunnel.retry_now()
            network.change()
            await trio.sleep(3)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert await visitor.receive_some()
        assert tunnel.status.state is State.CONNECTED
        assert len(relay.cables) == 1
        stream.reset()


async def test_without_a_check_only_the_heartbeat_ends_a_link(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The doubt is logged long before."""
    caplog.set_level(logging.INFO)
    async with connected() as (relay, tunnel):
        relay.cables[0].pull()
        with trio.move_on_after(14):
            await until(tunnel, State.RECONNECTING)
        assert tunnel.status.state is State.CONNECTED
        assert await until(tunnel, State.RECONNECTING) <= 16 + GOODBYE
    assert "nothing came from ws://relay.test for 20 seconds" in caplog.text


async def test_a_watcher_that_fails_costs_only_the_watch(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def watch(changed: Callable[[str], object], relay_addresses: Callable[[], Collection[str]]) -> None:
        raise OSError("no network to watch")

    async with connected(watch_network=watch) as (_relay, tunnel):
        assert tunnel.status.state is State.CONNECTED
    assert "changes of the network are not noticed any more" in caplog.text


async def test_a_dialer_of_the_host_means_a_network_of_the_host(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pioneer_tunnel.tunnel.network.watch_network", pytest.fail)
    async with connected() as (_relay, tunnel):
        assert tunnel.status.state is State.CONNECTED
