"""Several links of one tunnel, over real sockets: to one relay, to several, to old ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import pytest
import trio
from rig import (
    RelayRig,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    read_exactly,
    relay_rig,
    request,
    talk,
    tunnel_entry,
    upload,
)
from statuses import check_contract

from pioneer_tunnel import ErrorKind, InvalidSettingsError, RelayKey, Services, State, Tunnel
from pioneer_tunnel._model.errors import TunnelAuthError, TunnelError
from pioneer_tunnel.relay.gateways import opening
from pioneer_tunnel.relay.gateways.session import GatewaySession
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.yamux import YamuxConnection

OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789abcdef")


class Relays:
    """Several relays, which a gateway dials as relay0.test, relay1.test, …"""

    def __init__(self, rigs: Sequence[RelayRig]) -> None:
        self.rigs = rigs

    @property
    def urls(self) -> list[str]:
        return [f"ws://relay{index}.test" for index in range(len(self.rigs))]

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        return await connect(self.rigs[int(host.removeprefix("relay").removesuffix(".test"))].addresses.control)

    @asynccontextmanager
    async def tunnel(self, **changes: Any) -> AsyncIterator[Tunnel]:
        settings = {"relay": self.urls, "dial": self.dial} | changes

        async def serve() -> None:
            try:
                await trio.serve_listeners(echo, [tunnel])
            except* TunnelError:
                pass  # the test looks at the status

        async with self.rigs[0].tunnel(**settings) as tunnel, in_background(serve):
            yield tunnel
            check_contract(tunnel.history)


@asynccontextmanager
async def relays(*changes: dict[str, Any]) -> AsyncIterator[Relays]:
    async with AsyncExitStack() as stack:
        yield Relays(
            [
                await stack.enter_async_context(relay_rig(**({"public_names": [f"relay{index}.test"]} | each)))
                for index, each in enumerate(changes)
            ]
        )


async def links_are(tunnel: Tunnel, up: int) -> None:
    await eventually(lambda: tunnel.status.links_up == up)


def sessions(rig: RelayRig) -> list[GatewaySession]:
    return [session for session in rig.relay._gateways._sessions if session.entered]


async def echoes(visitor: trio.SocketStream, data: bytes) -> None:
    await visitor.send_all(data)
    assert await read_exactly(visitor, len(data)) == data


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let relays be old ones, which do not know the extension."""
    offers = {name: offer for name, offer in opening.OFFERS.items() if name != "links"}
    monkeypatch.setattr(opening, "OFFERS", offers)


# One relay


async def test_two_links_to_one_relay_share_its_visitors() -> None:
    with no_hang():
        async with relays({}) as them, them.tunnel(links=2) as tunnel:
            rig = them.rigs[0]
            await links_are(tunnel, 2)
            assert tunnel.status.links_wanted == 2
            assert [(link.up, link.relay, link.public_url) for link in tunnel.status.links or ()] == [
                (True, "ws://relay0.test", "http://office.test")
            ] * 2
            visitors = []
            for _ in range(6):
                visitors.append(await rig.visit())
                await visitors[-1].send_all(request())
                await visitors[-1].receive_some(1)
            assert [session.burden[0] for session in sessions(rig)] == [3, 3]
            for visitor in visitors:
                await visitor.aclose()
            await talk(rig.visit, 100_000)


async def test_a_link_that_ends_costs_its_own_streams_and_is_no_outage() -> None:
    with no_hang():
        async with relays({"resume_timeout_ms": 0}) as them, them.tunnel(links=2) as tunnel:
            rig = them.rigs[0]
            await links_are(tunnel, 2)
            visitors = []
            for _ in range(4):
                visitors.append(await rig.visit())
                await echoes(visitors[-1], upload())
            victim = sessions(rig)[0]
            victim.abandon()
            await eventually(lambda: any(status.links_up == 1 for status in tunnel.history[-3:]))
            await talk(rig.visit, 10_000)
            lost = 0
            for visitor in visitors:
                try:
                    await echoes(visitor, b"more")
                except trio.BrokenResourceError:
                    lost += 1
                await trio.aclose_forcefully(visitor)
            assert lost == 2
            await links_are(tunnel, 2)
            assert victim not in sessions(rig)
            assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_an_old_relay_gets_one_link() -> None:
    with no_hang(), pytest.MonkeyPatch.context() as patch:
        without_links(patch)
        async with relays({}) as them, them.tunnel(links=3) as tunnel:
            await links_are(tunnel, 1)
            (session,) = sessions(them.rigs[0])
            await trio.sleep(0.5)
            assert sessions(them.rigs[0]) == [session]
            assert [link.up for link in tunnel.status.links or ()].count(True) == 1
            assert any("one link of a gateway" in (link.message or "") for link in tunnel.status.links or ())
            assert tunnel.status.attempt == 1
            await talk(them.rigs[0].visit, 10_000)
            # The relay is replaced by a new one.
            patch.undo()
            await them.rigs[0].stop()
            await them.rigs[0].start()
            await links_are(tunnel, 3)
            assert len(sessions(them.rigs[0])) == 3


async def test_a_relay_that_forgets_the_extension_settles_with_one_link() -> None:
    with no_hang(), pytest.MonkeyPatch.context() as patch:
        async with relays({}) as them, them.tunnel(links=2) as tunnel:
            await links_are(tunnel, 2)
            without_links(patch)
            await them.rigs[0].stop()
            await them.rigs[0].start()
            await settles(tunnel, them.rigs[0])


async def test_two_names_of_one_old_relay_get_one_link() -> None:
    with no_hang(), pytest.MonkeyPatch.context() as patch:
        without_links(patch)
        async with relays({"public_names": ["relay0.test", "relay1.test"]}) as them:
            rig, urls = them.rigs[0], ["ws://relay0.test", "ws://relay1.test"]
            async with them.tunnel(relay=urls, dial=rig.dial) as tunnel:
                await settles(tunnel, rig)


async def settles(tunnel: Tunnel, rig: RelayRig) -> None:
    """One session stays, and no other is made."""

    def settled() -> bool:
        links = tunnel.status.links or ()
        return [link.up for link in links].count(True) == 1 and any(link.relay is None for link in links)

    await eventually(settled)
    await eventually(lambda: len(sessions(rig)) == 1)
    there, attempt = sessions(rig), tunnel.status.attempt
    await trio.sleep(0.5)
    assert (sessions(rig), tunnel.status.attempt) == (there, attempt)
    await talk(rig.visit, 10_000)


async def test_another_gateway_takes_all_links_over() -> None:
    with no_hang():
        async with relays({}) as them, them.tunnel(links=2, instance="first") as first:
            await links_are(first, 2)
            async with them.tunnel(links=2, instance="second") as second:
                await eventually(lambda: first.status.state is State.FAILED)
                assert first.status.error_kind is ErrorKind.INVALID_SETTINGS
                assert "'second'" in (first.status.message or "")
                await links_are(second, 2)
                assert {session.instance for session in sessions(them.rigs[0])} == {"second"}
                with pytest.raises(InvalidSettingsError):
                    await first.wait_connected()


async def test_a_gateway_that_restarts_with_one_link_ends_those_of_before() -> None:
    with no_hang():
        async with relays({}) as them:
            rig = them.rigs[0]
            async with them.tunnel(
                links=3, instance="the same", restart=RestartPolicy(initial=600, maximum=600)
            ) as old:
                await links_are(old, 3)
                async with them.tunnel(links=1, instance="the same") as new:
                    await new.wait_connected()
                    await eventually(lambda: len(sessions(rig)) == 1)
                    assert (new.status.links, new.status.links_up) == (None, None)
                    await eventually(lambda: old.status.state is State.RECONNECTING)


async def test_a_relay_that_drains_gets_the_next_session_of_each_link() -> None:
    with no_hang():
        async with relays({"drain_timeout_ms": 30_000}) as them, them.tunnel(links=2) as tunnel:
            rig = them.rigs[0]
            await links_are(tunnel, 2)
            before = set(sessions(rig))
            for session in before:
                session.drain(0.01)
            await eventually(lambda: len([each for each in sessions(rig) if each not in before]) == 2)
            for session in before:
                session.finish()
            await eventually(lambda: len(sessions(rig)) == 2 and before.isdisjoint(sessions(rig)))
            await talk(rig.visit, 10_000)
            assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_services_reach_all_links() -> None:
    entry = tunnel_entry(url=None, services=[{"name": name, "url": f"http://{name}.test"} for name in ("web", "ssh")])
    services = Services({"web": "127.0.0.1:1"})
    with no_hang():
        async with relays({"tunnels": [entry]}) as them, them.tunnel(links=2, services=services) as tunnel:
            await links_are(tunnel, 2)

            def told() -> list[set[str]]:
                return [set(session.services or ()) for session in sessions(them.rigs[0])]

            await eventually(lambda: told() == [{"web"}] * 2)
            services["ssh"] = "127.0.0.1:2"
            await eventually(lambda: told() == [{"web", "ssh"}] * 2)
            del services["web"]
            await eventually(lambda: told() == [{"ssh"}] * 2)


# Several relays


async def test_a_relay_that_goes_away_is_no_outage() -> None:
    with no_hang():
        async with relays({}, {}) as them, them.tunnel() as tunnel:
            await links_are(tunnel, 2)
            await them.rigs[0].stop()
            await links_are(tunnel, 1)
            await talk(them.rigs[1].visit, 10_000)
            down, up = tunnel.status.links or ()
            assert (down.up, down.relay, down.error_kind) == (False, them.urls[0], ErrorKind.RELAY_CONNECT_FAILED)
            assert up.up
            await them.rigs[0].start()
            await links_are(tunnel, 2)
            await talk(them.rigs[0].visit, 10_000)
            assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_each_relay_may_have_a_public_url_of_its_own() -> None:
    entries = [[tunnel_entry(url=f"http://office.relay{index}.test")] for index in range(2)]
    with no_hang():
        async with relays({"tunnels": entries[0]}, {"tunnels": entries[1]}) as them, them.tunnel() as tunnel:
            await links_are(tunnel, 2)
            first, second = "http://office.relay0.test", "http://office.relay1.test"
            assert [link.public_url for link in tunnel.status.links or ()] == [first, second]
            assert tunnel.public_url == first
            await them.rigs[0].stop()
            await eventually(lambda: tunnel.public_url == second)
            await them.rigs[0].start()
            await eventually(lambda: tunnel.public_url == first)


async def test_a_spare_relay_stands_in() -> None:
    with no_hang():
        async with relays({}, {}, {"resume_timeout_ms": 0}) as them, them.tunnel(links=2) as tunnel:
            await links_are(tunnel, 2)
            assert not sessions(them.rigs[2])
            await them.rigs[0].stop()
            await eventually(lambda: sessions(them.rigs[2]))
            await links_are(tunnel, 2)
            assert [link.relay for link in tunnel.status.links or ()] == [them.urls[2], them.urls[1]]


async def test_a_relay_that_rejects_the_key_is_no_outage() -> None:
    stranger = [tunnel_entry(key=str(OTHER_KEY.identity().public_key))]
    with no_hang():
        async with relays({"tunnels": stranger}, {}) as them, them.tunnel() as tunnel:
            await links_are(tunnel, 1)
            await eventually(lambda: rejected(tunnel, 0))
            assert tunnel.status.state is State.CONNECTED
            assert tunnel.status.error_kind is None
            # The operator corrects the entry.
            await them.rigs[0].apply(tunnels=[tunnel_entry()])
            tunnel.retry_now()
            await links_are(tunnel, 2)


def rejected(tunnel: Tunnel, index: int) -> bool:
    link = (tunnel.status.links or ())[index]
    return not link.up and link.error_kind is ErrorKind.TUNNEL_AUTH_FAILED


async def test_the_tunnel_fails_when_all_relays_reject_the_key() -> None:
    stranger = {"tunnels": [tunnel_entry(key=str(OTHER_KEY.identity().public_key))]}
    with no_hang():
        async with relays(stranger, stranger) as them, them.tunnel() as tunnel:
            with pytest.raises(TunnelAuthError):
                await tunnel.wait_connected()
            assert [status.state for status in tunnel.history][-1] is State.FAILED
            assert tunnel.status.links_up == 0


async def test_a_check_asks_all_links(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr(YamuxConnection, "check", lambda connection: checked.append(connection))  # noqa: PLW0108  # a method
    with no_hang():
        async with relays({}, {}) as them, them.tunnel() as tunnel:
            await links_are(tunnel, 2)
            tunnel.retry_now()
            await eventually(lambda: len(set(checked)) == 2)


@pytest.mark.parametrize("links", [0, 9, -1])
async def test_too_many_links_are_refused(links: int) -> None:
    async with relays({}) as them:
        with pytest.raises(InvalidSettingsError, match="allowed is 1 to 8"):
            async with them.tunnel(links=links):
                pass


async def test_no_relay_is_refused() -> None:
    async with relays({}) as them:
        with pytest.raises(InvalidSettingsError, match="no relay"):
            async with them.tunnel(relay=[]):
                pass
