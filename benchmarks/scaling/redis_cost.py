"""What the records of a fleet cost Redis: `python -m benchmarks.scaling.redis_cost`.

A real redis-server, and the store of one node. Memory and processor time are Redis's own, by its INFO. The names are as
long as those of real sessions; the name of a tunnel has 15 letters.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import attrs
import trio

from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.redis_store import RedisServer, RedisStore

from .hop import redis

AT_ONCE: Final = 32


@attrs.frozen
class Cost:
    """What Redis has used so far: bytes, and seconds of its processor."""

    memory: int
    cpu: float


def cost(path: Path) -> Cost:
    told = subprocess.run(["redis-cli", "-s", str(path), "INFO"], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    return Cost(int(fields["used_memory"]), float(fields["used_cpu_user"]) + float(fields["used_cpu_sys"]))


async def measure(path: Path, records: int) -> tuple[float, float, float]:
    """Bytes of a record, and microseconds of a write and of a read."""
    store = RedisStore(RedisServer(path=str(path)), "fra1")

    async def each(work: Callable[[int], Awaitable[object]]) -> Cost:
        """Do it for all records, some at a time. Returns what has been used after it."""
        numbers = iter(range(records))

        async def some() -> None:
            for number in numbers:
                await work(number)

        async with trio.open_nursery() as workers:
            for _ in range(AT_ONCE):
                workers.start_soon(some)
        return await trio.to_thread.run_sync(cost, path)

    async def write(number: int) -> object:
        holding = Holding(
            node="fra1",
            process=store.process,
            session=secrets.token_hex(8),
            key_id=secrets.token_hex(8),
            instance=secrets.token_hex(16),
            since=time.time(),
        )
        return await store.write(f"tunnel-{number:08d}", expected=0, holdings=[holding])

    async def read(number: int) -> object:
        return await store.read(f"tunnel-{number:08d}")

    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        before = await trio.to_thread.run_sync(cost, path)
        written = await each(write)
        have_read = await each(read)
        nursery.cancel_scope.cancel()
    return (
        (written.memory - before.memory) / records,
        (written.cpu - before.cpu) / records * 1e6,
        (have_read.cpu - written.cpu) / records * 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.redis_cost", description="Records in Redis.")
    parser.add_argument("--records", type=int, default=20_000, help="default %(default)s")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name, redis(Path(name)):
        memory, write, read = trio.run(measure, Path(name) / "redis", arguments.records)
    print(f"{memory:.0f} bytes for a record; {write:.0f} µs of Redis for a write, {read:.0f} µs for a read")


if __name__ == "__main__":
    main()
