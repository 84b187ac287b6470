"""`_net.delivery` and the options of a link's socket, on real sockets: the kernel is what is tested."""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from typing import Final

import pytest
import trio
from rig import eventually
from trio.testing import wait_all_tasks_blocked
from yamux_rig import sockets

from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.delivery import Delivery, Movement
from pioneer_tunnel._net.socket_options import delivery_of, limit_segment, unacknowledged, unsent
from pioneer_tunnel._net.tcp import TcpStream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells this")

TCP_RTO_MAX_MS: Final = 44
KIB: Final = 1024


async def watched_pair() -> tuple[TcpStream, TcpStream]:
    near, far = map(watch, await sockets())
    assert isinstance(near, TcpStream)
    assert isinstance(far, TcpStream)
    return near, far


async def test_what_the_peer_has_taken_is_counted_also_if_nobody_reads_it() -> None:
    near, far = await watched_pair()
    async with near, far:
        before, there = near.delivery(), far.delivery()
        assert before is not None
        assert there is not None
        await near.send_all(bytes(1000))
        await eventually(lambda: unacknowledged(near.socket) == 0)
        after, arrived = near.delivery(), far.delivery()
        assert after is not None
        assert arrived is not None
        assert after.taken > before.taken
        assert after.acknowledged == before.acknowledged + 1000 == after.written
        assert not after.waits
        assert arrived.arrived == there.arrived + 1000


async def test_bytes_that_the_peer_does_not_take_wait() -> None:
    near, far = await watched_pair()
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, bytes(32 * KIB * KIB))
        await wait_all_tasks_blocked(0.05)
        state = near.delivery()
        assert state is not None
        assert state.waits
        assert state.written - state.acknowledged == unacknowledged(near.socket) > 0
        assert near.sending_since is not None
        nursery.cancel_scope.cancel()


async def test_after_a_close_nothing_is_known() -> None:
    near, far = await watched_pair()
    await near.aclose()
    await far.aclose()
    assert near.delivery() is None
    assert unsent(near.socket) == unacknowledged(near.socket) == 0


async def test_room_is_waited_for_while_the_kernel_holds_more_than_half_of_the_limit() -> None:
    """Two tasks may wait: the one that wants to send, and one that sends."""
    near, far = await watched_pair()
    async with near, far, trio.open_nursery() as nursery:
        near.limit_unsent(4 * KIB)
        await near.wait_room()
        nursery.start_soon(near.send_all, bytes(16 * KIB * KIB))
        await wait_all_tasks_blocked(0.05)
        waited = trio.Event()

        async def wait() -> None:
            await near.wait_room()
            waited.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked(0.05)
        assert not waited.is_set()
        received = 0
        while received < 16 * KIB * KIB:
            received += len(await far.receive_some())
        await waited.wait()
        assert unsent(near.socket) <= 2 * KIB


async def test_a_link_outlasts_a_pause_and_notices_its_end_soon() -> None:
    near, far = await watched_pair()
    async with near, far:
        near.outlast(75.0)
        options = near.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert options == 75_000
        try:
            assert near.socket.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == 3000
        except OSError:
            pytest.skip("this kernel bounds it at 120 seconds")


async def test_before_bulk_the_algorithm_forgets_and_stays_the_same() -> None:
    near, far = await watched_pair()
    async with near, far:
        with contextlib.suppress(OSError):
            near.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")

        def algorithm() -> bytes:
            return bytes(near.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16))

        before, state = algorithm(), near.delivery()
        assert state is not None
        assert state.in_slow_start
        near.expect_bulk()
        assert algorithm() == before


async def test_a_segment_limit_holds_for_both_ends() -> None:
    with socket.socket() as listener, socket.socket() as near:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        limit_segment(near, 1220)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        with far:
            for sock in (near, far):
                state = delivery_of(sock)
                assert state is not None
                assert state.segment <= 1220


@pytest.mark.parametrize(
    ("acknowledged", "taken", "waiting", "stuck"),
    [
        (2_000, 20, 14_480, True),  # only small packets have arrived
        (2_000, 20, 1_448, False),  # one packet may just be on its way
        (2_000_000, 1_500, 14_480, False),  # large ones have arrived: it is not their size
    ],
)
def test_a_path_that_drops_large_packets_is_recognised(
    acknowledged: int, taken: int, waiting: int, stuck: bool
) -> None:
    state = Delivery(
        arrived=0,
        taken=taken,
        acknowledged=acknowledged,
        written=acknowledged + waiting,
        segment=1448,
        window_left=0,
        in_slow_start=True,
        longest_pause=10.0,
        resend_after=3.0,
    )
    assert state.stuck == stuck


def state_of(*, arrived: int = 0, taken: int = 0, acknowledged: int = 0, written: int = 0) -> Delivery:
    return Delivery(
        arrived=arrived,
        taken=taken,
        acknowledged=acknowledged,
        written=written,
        segment=1448,
        window_left=0,
        in_slow_start=True,
        longest_pause=10.0,
        resend_after=3.0,
    )


def test_movement_is_seen_in_both_directions() -> None:
    movement = Movement()
    movement.look(1.0, 0.5, state_of(written=100))
    assert (movement.received_at, movement.taken_at, movement.delivered_until) == (0.5, -math.inf, -math.inf)
    movement.look(2.0, 0.5, state_of(written=200, taken=1, acknowledged=50))
    assert (movement.received_at, movement.taken_at, movement.delivered_until) == (0.5, 2.0, -math.inf)
    movement.look(3.0, 0.5, state_of(written=200, taken=2, acknowledged=199))
    assert (movement.received_at, movement.taken_at, movement.delivered_until) == (0.5, 3.0, 1.0)
    movement.look(4.0, 0.5, state_of(written=200, taken=2, acknowledged=200, arrived=1))
    assert (movement.received_at, movement.taken_at, movement.delivered_until) == (4.0, 3.0, 4.0)


def test_where_the_system_tells_nothing_only_what_was_read_counts() -> None:
    movement = Movement()
    movement.look(9.0, 7.0, None)
    assert (movement.received_at, movement.taken_at, movement.delivered_until) == (7.0, -math.inf, math.inf)
