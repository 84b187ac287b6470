"""A gateway with links to several relays, all of them real processes: one relay is killed under traffic."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import trio
from programs import Program, Relay, relay_in, running
from restart_trial import CHUNK, INTERVAL, ask, serve_local
from rig import no_hang

SECONDS: Final = 1.0
"""That each download takes."""


async def download(relay: Relay) -> bool:
    """Whether it came to its end. What came is right in any case."""
    try:
        async with await trio.open_tcp_stream("127.0.0.1", relay.ingress) as visitor:
            body = await ask(visitor, f"/slow/{SECONDS}")
    except (EOFError, trio.BrokenResourceError):
        return False
    assert hashlib.sha256(body).digest() == hashlib.sha256(CHUNK * round(SECONDS / INTERVAL)).digest()
    return True


def statuses(gateway: Program) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in gateway.err.decode().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "state" in line]


async def links_are(gateway: Program, up: int, *, after: int = 0) -> int:
    """Wait until the newest status says how many links are up; returns how many statuses there are."""
    found = rf'(?s)(?:"state".*?){{{after}}}"links_up": {up}, .*?\n'
    with no_hang():
        await trio.to_thread.run_sync(gateway.wait_for, found)
    return len(statuses(gateway))


async def test_a_relay_that_is_killed_costs_its_own_streams_alone(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    outcomes: dict[str, list[bool]] = {"one": [], "other": []}

    async def note(relay: Relay, name: str) -> None:
        outcomes[name].append(await download(relay))

    with relay_in(folders[0]) as one, relay_in(folders[1]) as other:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(functools.partial(trio.serve_tcp, serve_local, 0, host="127.0.0.1"))
            local = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            both = ["--relay", one.url, "--relay", other.url]
            with running("expose", local, *both, "--key-file", one.folder / "key", "--json") as gateway:
                await links_are(gateway, 2)
                async with trio.open_nursery() as visitors:
                    for _ in range(5):
                        visitors.start_soon(note, one, "one")
                        visitors.start_soon(note, other, "other")
                    await trio.sleep(SECONDS / 2)
                    one.program.process.kill()
                    seen = await links_are(gateway, 1, after=len(statuses(gateway)))
                assert outcomes == {"one": [False] * 5, "other": [True] * 5}
                with running("relay", "--config", one.folder / "relay.toml") as again:
                    await trio.to_thread.run_sync(again.wait_for, "gateways at")
                    await links_are(gateway, 2, after=seen)
                    assert await download(one)
                    states = [status["state"] for status in statuses(gateway)]
                    assert states == ["starting"] + ["connected"] * (len(states) - 1)
            nursery.cancel_scope.cancel()
