"""`stats()` of a relay and of a tunnel: both ends count the same, over real sockets."""

from __future__ import annotations

import json
from typing import Any, Final

import cattrs
import trio
from rig import HOST, ask, eventually, no_hang, relay_config, relay_rig, request, tunnel_entry

from pioneer_tunnel import RelayKey, StreamStats, TunnelStats
from pioneer_tunnel.relay import RelayStats
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789abcd")


async def answer_requests(stream: TunnelStream) -> None:
    """Answer each request that has come at once."""
    async with stream:
        while await stream.receive_some():
            await stream.send_all(ANSWER)


async def keep_until_lost(stream: TunnelStream) -> None:
    async with stream:
        await stream.wait_broken()


def services() -> dict[str, Any]:
    web, ssh = {"name": "web", "url": f"http://{HOST}"}, {"name": "ssh", "bind_addr": "127.0.0.1:0"}
    return tunnel_entry(url=None, services=[web, ssh])


def in_json(stats: TunnelStats | RelayStats) -> object:
    """The same, after a way through JSON."""
    return cattrs.structure(json.loads(json.dumps(cattrs.unstructure(stats))), type(stats))


async def test_both_ends_count_streams_and_bytes_of_each_service() -> None:
    async with relay_rig(tunnels=[services()]) as rig:
        offered = {"web": "127.0.0.1:1", "ssh": "127.0.0.1:1"}
        async with rig.tunnel(services=offered) as tunnel, trio.open_nursery() as nursery:
            nursery.start_soon(accept_visitors, tunnel, answer_requests, nursery)
            with no_hang():
                await tunnel.wait_connected()
                asked = request()
                for _ in range(3):
                    async with await rig.visit() as visitor:
                        await ask(visitor, asked)
                ssh = await trio.open_tcp_stream("127.0.0.1", rig.addresses.tunnels["office"].port)
                await ssh.send_all(b"x" * 100_000)
                assert await ssh.receive_some(1)
                await eventually(lambda: tunnel.stats().services["ssh"].from_visitors_bytes_total == 100_000)
                await eventually(lambda: tunnel.stats().services["web"].open == 0)
                await eventually(lambda: rig.relay.stats().tunnels["office"].services["web"].open == 0)
                stats, relay = tunnel.stats(), rig.relay.stats()
            web = StreamStats(
                open=0,
                opened_total=3,
                from_visitors_bytes_total=3 * len(asked),
                to_visitors_bytes_total=3 * len(ANSWER),
            )
            of_relay = relay.tunnels["office"]
            assert stats.services["web"] == of_relay.services["web"] == web
            assert (stats.services["ssh"].open, of_relay.services["ssh"].open) == (1, 1)
            assert of_relay.services["ssh"].from_visitors_bytes_total == 100_000
            assert stats.streams == sum(stats.services.values(), StreamStats())
            assert relay.streams == of_relay.streams == sum(of_relay.services.values(), StreamStats())
            assert relay.connections.open == 2  # the gateway and ssh
            assert relay.connections.visitors_open == 1
            assert relay.connections.accepted_total == 5
            assert in_json(stats) == stats
            assert in_json(relay) == relay
            await ssh.aclose()
            nursery.cancel_scope.cancel()


async def test_a_session_says_how_it_stands() -> None:
    async with relay_rig() as rig, rig.tunnel(instance="cellar") as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        (mine,), (its,) = tunnel.stats().sessions, rig.relay.stats().tunnels["office"].sessions
        assert mine.id == its.id
        assert mine.peer == str(rig.addresses.control)
        assert its.peer is not None
        assert its.peer.startswith("127.0.0.1:")
        assert its.instance == "cellar"
        assert its.agent is not None
        assert its.agent.startswith("pioneer-tunnel")
        assert mine.extensions == its.extensions
        assert {"resume", "draining"} <= {*its.extensions}
        assert mine.engine in {"websockets", "trio-websocket"}
        assert mine.round_trip_ms is not None
        assert mine.since_unix >= tunnel.stats().since_unix
        assert not any((mine.suspended, mine.draining, its.suspended, its.draining))


async def test_reconnects_are_counted_and_the_counts_of_streams_go_on() -> None:
    async with relay_rig(resume_timeout_ms=0) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(accept_visitors, tunnel, keep_until_lost, nursery)
        with no_hang():
            await tunnel.wait_connected()
            async with await rig.visit() as visitor:
                await visitor.send_all(request())
                await eventually(lambda: tunnel.stats().streams.open == 1)
                await rig.stop()
            await eventually(lambda: tunnel.stats().sessions == ())
            assert tunnel.stats().streams.open == 0
            await rig.start()
            await tunnel.wait_connected()
            stats = tunnel.stats()
        assert stats.sessions_total == 2
        assert stats.losses_total == 1
        assert stats.attempts_total >= 2
        assert stats.failures_total["relay_connect_failed"] >= 1
        assert stats.streams.opened_total == 1
        nursery.cancel_scope.cancel()


async def test_a_removed_tunnel_stays_in_the_sums() -> None:
    other = tunnel_entry(id="other", url="http://other.test", key=str(OTHER_KEY.identity().public_key))
    async with relay_rig(tunnels=[tunnel_entry(), other]) as rig, rig.tunnel() as tunnel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_visitors, tunnel, answer_requests, nursery)
            with no_hang():
                await tunnel.wait_connected()
                async with await rig.visit() as visitor:
                    await ask(visitor, request())
                await eventually(lambda: rig.relay.stats().streams.open == 0)
                before = rig.relay.stats()
                await rig.apply(tunnels=relay_config(tunnels=[other]).tunnels)
                await eventually(lambda: rig.relay.stats().sessions_open == 0)
                after = rig.relay.stats()
            nursery.cancel_scope.cancel()
        assert [*before.tunnels] == ["office", "other"]
        assert [*after.tunnels] == ["other"]
        assert after.streams == before.streams
        assert after.streams.opened_total == 1
        assert after.sessions_total == before.sessions_total == 1


async def test_refusals_are_counted_by_reason() -> None:
    async with relay_rig() as rig:
        with no_hang():
            for asked in (request(), request(host="nobody.test"), b"nonsense\r\n\r\n"):
                async with await rig.visit() as visitor:
                    await ask(visitor, asked)
            async with rig.tunnel(key=OTHER_KEY) as tunnel:
                await eventually(lambda: tunnel.stats().failures_total != {})
                assert tunnel.stats().failures_total == {"tunnel_auth_failed": 1}
        relay = rig.relay.stats()
        expected = {"gateway_away": 1, "unknown_host": 1, "bad_request": 1, "auth_failed": 1}
        assert relay.refusals_total == expected
        assert relay.tunnels["office"].refusals_total == {"gateway_away": 1}
