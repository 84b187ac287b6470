"""Two other yamux implementations talk to ours over TCP: hashicorp/yamux (Go) and @chainsafe/libp2p-yamux (Node).

`make test` installs what the program for Node needs, where npm can; `make interop` builds the one for Go as well. The
tests of a program that is not there are skipped. Each program dials us, takes either role, and does the same things.

A stream that one end opens begins with a byte that tells the other end what to do with it:

    d   read to the end (half-close), then answer with the SHA-256 of what came after the byte
    l   the same for a u32 length and so many bytes, for an opener that cannot receive after it has closed its half
    e   echo what comes, until the end
    r   reset it

A line on a program's standard input makes it act, and it answers with a line on its standard output:

    open COUNT SIZE PIECE half|whole    ask on COUNT streams at once (d or l), SIZE bytes written in PIECEs
    reset                               open a stream, ask for its reset (r), and tell how it ended
    ping, goaway                        what they say
    try                                 open one more stream
    halfclose                           (Go) does half-close work when this library talks to itself?
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, final

import pytest
import trio
from rig import no_hang
from yamux_rig import KIB, Running, ask, body, read_all

from pioneer_tunnel.yamux import Limits, Role, YamuxStream
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW

HERE: Final = Path(__file__).parent / "interop"
GO_PEER: Final = HERE.parent.parent / "build" / "interop" / "go-peer"
NODE: Final = shutil.which("node")

go = pytest.param(
    (str(GO_PEER),),
    id="go",
    marks=pytest.mark.skipif(not GO_PEER.exists(), reason="no Go peer was built: `make interop` does it"),
)
node = pytest.param(
    (NODE, str(HERE / "peer.mjs")),
    id="node",
    marks=pytest.mark.skipif(
        NODE is None or not (HERE / "node_modules" / ".ready").exists(),
        reason="no Node, or npm could not install @chainsafe/libp2p-yamux: `make interop` tries again",
    ),
)

with_both = pytest.mark.parametrize("program", [go, node])
in_both_roles = pytest.mark.parametrize("role", list(Role), ids=["as client", "as server"])
"""Our role; the program has the other one."""


@final
class Peer:
    """A program at the other end, and our connection to it."""

    def __init__(self, process: trio.Process, running: Running) -> None:
        self.process: Final = process
        self.running: Final = running
        self._said = b""

    async def tell(self, command: str) -> str:
        """Make the program act; returns what it answers."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")
        return await self.line()

    async def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._said:
            said = await self.process.stdout.receive_some()
            assert said, f"the program ended after {self._said!r}"
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    async def question(self, question: bytes, piece: int | None = None) -> None:
        """Open a stream, send `question` in pieces, end, and check the answer."""
        async with await self.running.open() as stream:
            await stream.send_all(b"d")
            for start in range(0, len(question), piece or max(len(question), 1)):
                await stream.send_all(question[start : start + (piece or len(question))])
            await stream.send_eof()
            assert await read_all(stream) == hashlib.sha256(question).digest()

    async def serve(self) -> None:
        """Do on streams that the program opens what their first byte says."""
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(serve, await self.running.accept())


async def serve(stream: YamuxStream) -> None:
    wanted = await stream.receive_some(1)
    if wanted == b"r":
        stream.reset()
        return
    async with stream:
        if wanted == b"l":
            size = int.from_bytes(await exactly(stream, 4), "big")
            question = await exactly(stream, size)
        else:
            assert wanted == b"d"
            question = await read_all(stream)
        await stream.send_all(hashlib.sha256(question).digest())


async def exactly(stream: YamuxStream, amount: int) -> bytes:
    received = bytearray()
    while len(received) < amount:
        some = await stream.receive_some(amount - len(received))
        assert some, f"the stream ended after {len(received)} of {amount} bytes"
        received += some
    return bytes(received)


@asynccontextmanager
async def talk(program: tuple[str, ...], role: Role) -> AsyncIterator[Peer]:
    """Start `program`, let it dial us, and carry a session with it."""
    theirs = "server" if role is Role.CLIENT else "client"
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        port = listener.socket.getsockname()[1]
        command = [*program, str(port), theirs]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        async with process.stdin, process.stdout:
            try:
                with no_hang():
                    # js-libp2p opens as much as it likes at once, without a look at what was accepted.
                    running = Running(await listener.accept(), role, limits=Limits(unaccepted=1000))
                nursery.start_soon(running.run)
                peer = Peer(process, running)
                assert await peer.line() == "ready"
                nursery.start_soon(peer.serve)
                with no_hang():
                    yield peer
                await process.stdin.aclose()
                with no_hang():
                    assert await process.wait() == 0
                    await running.ended.wait()
            finally:
                with suppress(ProcessLookupError):
                    process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        nursery.cancel_scope.cancel()


async def how_it_asks(peer: Peer, program: tuple[str, ...]) -> str:
    """Whether the program can end its half and still receive.

    The reference of 2019, which Debian has, cannot: `Read` on a stream that was closed at this end returns `io.EOF`
    as soon as nothing is buffered, whatever still comes (its `Stream.Read` treats `streamLocalClose` as an end). The
    program proves it without us, over a pipe to itself, and then asks without a half-close.
    """
    if program[0] == NODE:
        return "half"
    return "half" if await peer.tell("halfclose") == "true" else "whole"


# Streams that we open


@with_both
@in_both_roles
@pytest.mark.parametrize("count", [1, 100, pytest.param(1000, marks=pytest.mark.slow)])
async def test_streams_that_we_open_carry_what_was_sent(program: tuple[str, ...], role: Role, count: int) -> None:
    """Each ends its half first, and then receives the whole answer."""
    async with talk(program, role) as peer, trio.open_nursery() as nursery:
        for number in range(count):
            size = random.Random(number).choice([0, 1, 1000, 20_000])
            nursery.start_soon(peer.question, body(size, number))


@with_both
@in_both_roles
async def test_huge_and_tiny_writes_that_we_make(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(peer.question, body(5_000_000))
        nursery.start_soon(peer.question, body(2000), 1)
        nursery.start_soon(peer.question, body(1_000_000), 777)


@with_both
@in_both_roles
async def test_both_directions_of_a_stream_at_once(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer, trio.open_nursery() as nursery:

        async def echoed(seed: int) -> None:
            async with await peer.running.open() as stream:
                await stream.send_all(b"e")
                assert await ask(stream, body(2_000_000, seed)) == body(2_000_000, seed)

        for seed in range(3):
            nursery.start_soon(echoed, seed)


@with_both
@in_both_roles
async def test_a_stream_that_we_do_not_read_holds_up_nobody(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer, trio.open_nursery() as nursery:
        stuck = await peer.running.open()
        await stuck.send_all(b"e")
        size = INITIAL_WINDOW + 100 * KIB
        nursery.start_soon(stuck.send_all, body(size))
        async with trio.open_nursery() as others:
            for number in range(50):
                others.start_soon(peer.question, body(20_000, number))
        assert await exactly(stuck, size) == body(size)
        await stuck.aclose()


# Streams that they open


@with_both
@in_both_roles
@pytest.mark.parametrize(
    ("count", "size", "piece"),
    [(1, 0, 1), (100, 20_000, 20_000), pytest.param(1000, 300, 100, marks=pytest.mark.slow)],
)
async def test_streams_that_they_open_carry_what_was_sent(
    program: tuple[str, ...], role: Role, count: int, size: int, piece: int
) -> None:
    async with talk(program, role) as peer:
        how = await how_it_asks(peer, program)
        assert await peer.tell(f"open {count} {size} {piece} {how}") == f"{count} right"


@with_both
@in_both_roles
@pytest.mark.parametrize(("size", "piece"), [(2000, 1), (5_000_000, 5_000_000)], ids=["tiny", "huge"])
async def test_huge_and_tiny_writes_that_they_make(program: tuple[str, ...], role: Role, size: int, piece: int) -> None:
    async with talk(program, role) as peer:
        how = await how_it_asks(peer, program)
        assert await peer.tell(f"open 3 {size} {piece} {how}") == "3 right"


@with_both
async def test_both_ends_open_at_once(program: tuple[str, ...]) -> None:
    async with talk(program, Role.CLIENT) as peer, trio.open_nursery() as nursery:
        how = await how_it_asks(peer, program)
        for number in range(200):
            nursery.start_soon(peer.question, body(2000, number))
        assert await peer.tell(f"open 200 2000 500 {how}") == "200 right"


# Resets, pings, go-aways, endings


@with_both
@in_both_roles
async def test_our_reset_arrives(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        assert await peer.tell("reset") == "reset"
        await peer.question(b"the session goes on")


@pytest.mark.parametrize("program", [node])
@in_both_roles
async def test_their_reset_arrives(program: tuple[str, ...], role: Role) -> None:
    """Go's has no way to reset a stream, except to refuse one after a go-away: see there."""
    async with talk(program, role) as peer:
        async with await peer.running.open() as stream:
            await stream.send_all(b"r")
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await stream.receive_some()
        await peer.question(b"the session goes on")


@with_both
@in_both_roles
async def test_pings_are_answered_both_ways(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        assert (await peer.tell("ping")).startswith("pong after ")
        while not peer.running.round_trips:
            await trio.sleep(0.01)
        assert peer.running.round_trips[0] >= 0


@with_both
@in_both_roles
async def test_after_our_go_away_they_open_nothing(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        assert await peer.tell("try") == "opened" or program[0] != NODE
        stream = await peer.running.open()
        await stream.send_all(b"d the question")
        peer.running.connection.refuse_streams()
        while await peer.tell("try") != "refused":
            await trio.sleep(0.01)  # the go-away is on its way; until it is there, what they open is reset
        if program[0] != NODE:  # js-libp2p takes a go-away for the end of all streams
            await stream.send_eof()
            assert await read_all(stream) == hashlib.sha256(b" the question").digest()
        await stream.aclose()


@with_both
@in_both_roles
async def test_after_their_go_away_we_open_nothing(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        await peer.question(b"before")
        assert await peer.tell("goaway") == "gone"
        while not peer.running.session.peer_going_away:
            await trio.sleep(0.01)
        with pytest.raises(trio.BrokenResourceError):
            await peer.running.open()


@with_both
@in_both_roles
async def test_when_they_go_our_session_ends_and_says_why(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        await peer.question(b"before")
    assert isinstance(peer.running.ending, trio.BrokenResourceError)


@with_both
@in_both_roles
async def test_when_we_go_they_see_an_orderly_end(program: tuple[str, ...], role: Role) -> None:
    async with talk(program, role) as peer:
        await peer.question(b"before")
        peer.running.scope.cancel()
        await peer.running.ended.wait()
