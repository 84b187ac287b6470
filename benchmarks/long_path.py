"""A round trip of 50 ms between gateway and relay, in one process and in virtual time.

A visitor's path is that of production: the relay's endpoints, WebSocket and yamux. Connections are in memory, and the
gateway's is delayed. Time passes only while everybody waits, so processors cost nothing, and figures repeat exactly:
they say how often the two ends wait for each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, final

import trio

from pioneer_tunnel import open_tunnel
from pioneer_tunnel.testing import MemoryRelay, open_memory_relay
from pioneer_tunnel.testing.virtual_time import run_virtually

from .measuring import Figures

__all__ = ["ROUND_TRIP", "measure_long_path"]

ROUND_TRIP: Final = 0.05
VISITORS: Final = 100
MIB: Final = 64
PIECE: Final = 256 * 1024
SETTLE: Final = 1.0
"""Virtual seconds until the session is quiet."""


def measure_long_path(mib: int = MIB) -> Figures:
    """The first bytes of 100 visitors at once, and a download of `mib` MiB, in round trips."""
    firsts, download = run_virtually(functools.partial(_measure, mib << 20))
    return {
        "far_first_byte": min(firsts) / ROUND_TRIP,
        "far_last_byte": max(firsts) / ROUND_TRIP,
        "far_download": download / ROUND_TRIP,
        "far_download_rate": mib * 2**20 / 1e6 / download,
    }


async def _measure(amount: int) -> tuple[Sequence[float], float]:
    async def answer(stream: trio.SocketStream | trio.abc.Stream) -> None:
        async with stream:
            left = int(await _receive(stream, 16))
            while left:
                piece = min(left, PIECE)
                await stream.send_all(bytes(piece))
                left -= piece

    async with trio.open_nursery() as nursery, open_memory_relay() as relay:

        async def dial(host: str, port: int) -> trio.abc.Stream:
            delayed = _Delayed(await relay.dial(host, port))
            nursery.start_soon(delayed.carry)
            return delayed

        async with open_tunnel(relay.url, key=relay.key, dial=dial) as tunnel:
            nursery.start_soon(trio.serve_listeners, answer, [tunnel])
            await tunnel.wait_connected()
            await trio.sleep(SETTLE)
            firsts = list[float]()
            async with trio.open_nursery() as visitors:
                for _ in range(VISITORS):
                    visitors.start_soon(_visit, relay, firsts)
            began = trio.current_time()
            stream = await relay.visit()
            async with stream:
                await stream.send_all(b"%16d" % amount)
                await _receive(stream, amount)
            download = trio.current_time() - began
            nursery.cancel_scope.cancel()
    return firsts, download


async def _visit(relay: MemoryRelay, firsts: list[float]) -> None:
    began = trio.current_time()
    async with await relay.visit() as stream:
        await stream.send_all(b"%16d" % 1)
        await _receive(stream, 1)
        firsts.append(trio.current_time() - began)


async def _receive(stream: trio.abc.ReceiveStream, amount: int) -> bytes:
    """The next `amount` bytes; long ones come back as zeros, since they are only counted."""
    received, last = 0, b""
    while received < amount:
        last = bytes(await stream.receive_some(min(amount - received, PIECE)))
        if not last:
            raise ConnectionError("the stream ended too early")
        received += len(last)
    return last


@final
class _Delayed(trio.abc.Stream):
    """A stream whose bytes take half of `ROUND_TRIP` in each direction. The path takes any amount of them."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream: Final = stream
        self._sent, self._to_send = trio.open_memory_channel[tuple[float, bytes]](math.inf)
        self._received, self._to_arrive = trio.open_memory_channel[tuple[float, bytes]](math.inf)
        self._arrived: Final = bytearray()
        self._ended = False
        self._change = trio.Event()

    async def carry(self) -> None:
        """Carry bytes in both directions until the stream ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._receive)
            async for due, data in self._to_arrive:
                await trio.sleep_until(due)
                self._arrived.extend(data)
                self._change.set()
            nursery.cancel_scope.cancel()
        self._ended = True
        self._change.set()

    async def _send(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for due, data in self._to_send:
                await trio.sleep_until(due)
                await self._stream.send_all(data)

    async def _receive(self) -> None:
        with self._received, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := bytes(await self._stream.receive_some(PIECE)):
                self._received.send_nowait((trio.current_time() + ROUND_TRIP / 2, data))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._sent.send_nowait((trio.current_time() + ROUND_TRIP / 2, bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._arrived and not self._ended:
            await self._change.wait()
            self._change = trio.Event()
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[:max_bytes]
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()
