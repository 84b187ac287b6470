"""What TCP knows of a connection: how much the peer has acknowledged, and how long a living path may pause. No I/O.

The fields of Linux's TCP_INFO are read by their offsets, which never change: new kernels append.
"""

from __future__ import annotations

import math
import struct
from typing import Final, final

import attrs

__all__ = ["INFO_SIZE", "LONGEST_PAUSE", "Delivery", "Movement"]

# Of `struct tcp_info` in the kernel's include/uapi/linux/tcp.h: the offset of each field.
_SEGMENT_SIZE: Final = struct.Struct("=16xI")
_ROUND_TRIP: Final = struct.Struct("=68xII")  # smoothed, and its variance; microseconds
_IN_FLIGHT: Final = struct.Struct("=24xIIII")  # unacknowledged, and of these: taken, lost, sent again; packets
_WINDOW: Final = struct.Struct("=76xII")  # where slow start ends, and what may be in flight; packets
_BYTES: Final = struct.Struct("=120xQQ")  # acknowledged, and received; both in order
_TAKEN: Final = struct.Struct("=192xI")  # packets, also those beyond a gap (Linux 4.18)
_BEYOND_A_GAP: Final = struct.Struct("=224xI")  # packets that arrived (Linux 5.4)
INFO_SIZE: Final = 228
_NEVER: Final = 0x7FFFFFFF
_MOST_LOOKS: Final = 64

# Of `Delivery.longest_pause`: its bounds, and how many timeouts in a row it allows for.
_SHORTEST_PAUSE: Final = 10.0
LONGEST_PAUSE: Final = 60.0
_TIMEOUTS: Final = 3

RESEND_SECONDS: Final = 3.0
"""A hole in the path is noticed to be over after at most so many seconds. The system's default grows up to 120."""


@final
@attrs.frozen
class Delivery:
    """The state of a connection at one moment. The counters mean something only compared with an earlier moment.

    Attributes:
        arrived: grows when the peer's data arrives, also beyond a gap.
        taken: grows when the peer's system acknowledges data, also beyond a gap.
        acknowledged: bytes that it has acknowledged without a gap.
        written: bytes that were written.
        segment: bytes of the largest packet.
        window_left: bytes that TCP would send at once.
        in_slow_start: whether TCP is in its first slow start.
        longest_pause: seconds in which nothing may arrive although the path lives: some lost packets, which are sent
            again after a timeout that follows from the round trip.
        resend_after: seconds after which a lost packet should be sent again, at most.
    """

    arrived: int
    taken: int
    acknowledged: int
    written: int
    segment: int
    window_left: int
    in_slow_start: bool
    longest_pause: float
    resend_after: float

    @property
    def waits(self) -> bool:
        """Whether written bytes are not acknowledged."""
        return self.written > self.acknowledged

    @property
    def stuck(self) -> bool:
        """Whether the path may drop large packets: more than one waits, and those that arrived were small."""
        return self.written - self.acknowledged > self.segment and 2 * self.acknowledged < self.taken * self.segment

    @classmethod
    def parse(cls, info: bytes, unacknowledged: int) -> Delivery | None:
        """Parse what TCP_INFO returns; None if the kernel is too old to tell everything.

        Args:
            info: the first `INFO_SIZE` bytes of it.
            unacknowledged: bytes that were written and not acknowledged.
        """
        if len(info) < INFO_SIZE:
            return None
        [segment] = _SEGMENT_SIZE.unpack_from(info)
        smoothed, variance = _ROUND_TRIP.unpack_from(info)
        timeout = (smoothed + 4 * variance) / 1e6
        acknowledged, received = _BYTES.unpack_from(info)
        unacked, sacked, lost, again = _IN_FLIGHT.unpack_from(info)
        slow_start_ends, window = _WINDOW.unpack_from(info)
        [beyond], [taken] = _BEYOND_A_GAP.unpack_from(info), _TAKEN.unpack_from(info)
        return cls(
            arrived=received + beyond,
            taken=taken,
            acknowledged=acknowledged,
            written=acknowledged + unacknowledged,
            segment=segment,
            window_left=max(window - unacked + sacked + lost - again, 0) * segment,
            in_slow_start=slow_start_ends >= _NEVER,
            longest_pause=min(max(_TIMEOUTS * timeout, _SHORTEST_PAUSE), LONGEST_PAUSE),
            resend_after=max(2 * timeout, RESEND_SECONDS),
        )


@final
class Movement:
    """When bytes were last seen to move on a connection.

    Attributes:
        received_at: when data last arrived, also beyond a gap.
        taken_at: when the peer's system last acknowledged data, also beyond a gap.
        delivered_until: what was written until then, the peer's system has. Infinity if that is not known.
    """

    __slots__ = ("_before", "_written", "delivered_until", "received_at", "taken_at")

    def __init__(self) -> None:
        self._before: Delivery | None = None
        self._written: list[tuple[float, int]] = []  # no deque: an empty one takes 0.7 KiB, and most links are idle
        self.received_at: float = -math.inf
        self.taken_at: float = -math.inf
        self.delivered_until: float = math.inf

    def look(self, now: float, heard_at: float, delivery: Delivery | None) -> None:
        """Take note of the state of the connection. Times are as exact as looks are frequent.

        Args:
            now: in seconds.
            heard_at: when the last byte arrived.
            delivery: the state; None if it is not known.
        """
        before, self._before = self._before, delivery
        self.received_at = max(self.received_at, heard_at)
        if delivery is None:
            return
        if before is None:
            self.delivered_until = -math.inf
        else:
            if delivery.arrived != before.arrived:
                self.received_at = now
            if delivery.taken != before.taken:
                self.taken_at = now
        written = self._written
        written.append((now, delivery.written))
        if len(written) > _MOST_LOOKS:
            del written[0]
        while written and written[0][1] <= delivery.acknowledged:
            self.delivered_until = written.pop(0)[0]
