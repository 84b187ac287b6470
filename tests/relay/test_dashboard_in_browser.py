"""The operator's page of a relay in a browser: looked at in all its states, used with keys alone, attacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from browser import Tab, needs_axe, needs_chromium, open_browser
from rig import HOST, RelayRig, in_background, read_all, relay_rig, request, tunnel_entry

from pioneer_tunnel import StreamStats, new_relay_key
from pioneer_tunnel._model.stats import SessionStats
from pioneer_tunnel.relay import RelayStats, RelayTunnelStats
from pioneer_tunnel.relay.dashboard import site
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

pytestmark = [pytest.mark.slow, needs_chromium]

HOSTILE: Final = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
TUNNELS: Final = ["office", "home", "leaving", "lost", "away", "a-tunnel-with-a-long-name-" + "x" * 60]


def url_of(rig: RelayRig) -> str:
    return f"http://{rig.addresses.dashboard}"


async def rows(tab: Tab, table: str) -> list[list[str]]:
    """The texts of a table's cells."""
    script = f"[...document.querySelectorAll('#{table} tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
    found: list[list[str]] = await tab.run(script)
    return found


def session(**changes: Any) -> SessionStats:
    fields: dict[str, Any] = {
        "since_unix": 1_796_059_000.0,
        "peer": "192.0.2.1:50412",
        "agent": "pioneer-tunnel/0.9.1",
        "round_trip_ms": 12.34,
    }
    return SessionStats(**(fields | changes))


def staged(stats: RelayStats, step: int) -> RelayStats:
    """A relay with tunnels in all states, `step` samples after its start."""
    long = TUNNELS[-1]
    sessions: Mapping[str, tuple[SessionStats, ...]] = {
        "office": (session(draining=True), session()),
        "home": (session(agent=HOSTILE, resumes_total=3),),
        "leaving": (session(draining=True),),
        "lost": (session(suspended=True, round_trip_ms=None),),
        long: (session(peer=None, agent=None),),
    }
    amounts = {"office": 40_000 * step * step, "home": 1_000_000 * (step % 7 + 5 * step), long: 10**13}
    tunnels = {
        name: RelayTunnelStats(
            sessions=sessions.get(name, ()),
            streams=StreamStats(
                open=amounts.get(name, 0) % 97,
                opened_total=12345,
                from_visitors_bytes_total=amounts.get(name, 0) // 10,
                to_visitors_bytes_total=amounts.get(name, 0),
            ),
            refusals_total={"gateway_away": step} if name == "away" else {},
        )
        for name in TUNNELS
    }
    refusals = {"gateway_away": step, "auth_failed": step // 20 * 7, "unknown_host": 99}
    streams = sum((tunnel.streams for tunnel in tunnels.values()), StreamStats())
    return attrs.evolve(stats, tunnels=tunnels, streams=streams, refusals_total=refusals, since_unix=1_796_000_000.0)


@needs_axe
async def test_every_state_can_be_read_by_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are staged here; that they are those of the relay is the subject of the next test."""
    step, draining = 0, False

    def stats(real: RelayStats) -> RelayStats:
        nonlocal step
        step += 1
        return attrs.evolve(staged(real, step), draining=draining)

    take_samples = site.Dashboard.take_samples

    async def take_staged(self: site.Dashboard) -> None:
        real = self._stats
        monkeypatch.setattr(self, "_stats", lambda: stats(real()))
        for _ in range(110):
            self._history.add(self._stats())
        await take_samples(self)

    monkeypatch.setattr(site.Dashboard, "take_samples", take_staged)
    tunnels = [
        tunnel_entry(id=name, url=f"https://{name[:20]}.example.com", key=str(new_relay_key().identity().public_key))
        for name in TUNNELS
    ]
    async with (
        relay_rig(dashboard="127.0.0.1:0", tunnels=tunnels) as rig,
        open_browser(tmp_path / "profile") as browser,
    ):
        tab = await browser.open()
        await tab.go(url_of(rig))
        await tab.until("document.querySelectorAll('#tunnels tr').length === 6")
        for draining in (False, True):
            await tab.until(
                f"document.getElementById('state').innerText.includes('stopping') === {json.dumps(draining)}"
            )
            for width in (1280, 360):
                for dark in (False, True):
                    await tab.look(width=width, dark=dark)
                    await tab.audit()
                    name = f"dashboard-{'draining' if draining else 'serving'}-{width}-{'dark' if dark else 'light'}"
                    await tab.screenshot(name)
        states = {row[0].split("\n")[0]: row[1].split("\n")[0] for row in await rows(tab, "tunnels")}
        assert {name: state[2:] for name, state in states.items()} == {
            "office": "Connected", "home": "Connected", "leaving": "Leaving", "lost": "Link lost", "away": "Away",
            TUNNELS[-1]: "Connected",
        }  # fmt: skip
        assert [row[0] for row in await rows(tab, "refusals")] == ["gateway_away", "auth_failed", "unknown_host"]
        (told,) = [row[2] for row in await rows(tab, "tunnels") if row[0].startswith("home")]
        assert told.startswith(HOSTILE)  # what a gateway says of itself is text
        assert await tab.run("document.querySelectorAll('main img, main script').length") == 0
        assert await tab.run("document.title") == "Relay relay-of-the-tests"
        assert browser.console == []


async def answer(stream: TunnelStream) -> None:
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + bytes(50_000))


async def test_it_follows_the_relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "INTERVAL", 0.2)
    monkeypatch.setattr("pioneer_tunnel.relay.dashboard.report.INTERVAL", 0.2)
    async with relay_rig(dashboard="127.0.0.1:0") as rig, open_browser(tmp_path / "profile") as browser:
        tab = await browser.open()
        await tab.go(url_of(rig))
        await tab.until("document.getElementById('tunnels').innerText.includes('Away')")
        assert (
            await tab.run("document.getElementById('refusals-note').innerText") == "Nobody was refused since the start."
        )
        await tab.audit()
        await tab.screenshot("dashboard-empty-1280-light")
        async with rig.tunnel() as tunnel, trio.open_nursery() as nursery:
            nursery.start_soon(accept_visitors, tunnel, answer, nursery)
            await tab.until("document.getElementById('tunnels').innerText.includes('Connected')")
            for host in (HOST, "unknown.test"):
                async with await rig.visit() as visitor:
                    await visitor.send_all(request("Connection: close", host=host))
                    await read_all(visitor)
            await tab.until("document.getElementById('refusals').innerText.includes('unknown_host')")
            await tab.until("document.getElementById('traffic').innerText.includes('50 kB since the start')")
            (row,) = await rows(tab, "tunnels")
            assert row[3] == "0\n1 in all"

            # With keys alone.
            order = []
            for _ in range(3):
                await tab.press("Tab")
                order.append(await tab.run("document.activeElement.id || document.activeElement.getAttribute('role')"))
                assert await tab.run("getComputedStyle(document.activeElement).outlineStyle === 'solid'")
            assert order == ["pause", "region", "refusals-table"]
            await tab.run("document.getElementById('pause').focus()")
            await tab.press(" ")
            await tab.until("document.getElementById('state').innerText.startsWith('Paused. This is from')")
            nursery.cancel_scope.cancel()
        await trio.sleep(1)
        assert "Connected" in await tab.run("document.getElementById('tunnels').innerText")
        await tab.press("Enter")
        await tab.until("!document.getElementById('tunnels').innerText.includes('Connected')")
        await rig.stop()
        await tab.until("document.getElementById('state').innerText.startsWith('The relay does not answer.')")
        await tab.audit()
        await tab.screenshot("dashboard-gone-1280-light")
        await rig.start()


async def test_another_site_reads_nothing(tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1\r\n\r\n\n")

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with (
        relay_rig(dashboard="127.0.0.1:0") as rig,
        in_background(lambda: trio.serve_listeners(serve, [listener])),
    ):
        target = url_of(rig)
        rebound = f"evil.test:{target.rpartition(':')[2]}"
        names = {"evil.test:80": port, rebound: int(target.rpartition(":")[2])}
        async with open_browser(tmp_path / "profile", names) as browser:
            tab = await browser.open()
            for origin in ("http://evil.test", f"http://127.0.0.1:{port}"):
                await tab.go(origin)
                tried = f"fetch('{target}/report.json').then(() => 'read', () => 'blocked')"
                assert await tab.run(tried) == "blocked"
                script = f"Object.assign(document.createElement('script'), {{src: '{target}/report.json'}})"
                ends = "onload: () => end('loaded'), onerror: () => end('blocked')"
                loaded = f"new Promise((end) => document.head.append(Object.assign({script}, {{{ends}}})))"
                assert await tab.run(loaded) == "blocked"
            await tab.go(f"http://{rebound}")
            assert await tab.run("document.body.innerText.trim()") == "this page is at localhost"
