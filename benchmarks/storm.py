"""All gateways of a relay lose it at once, and come back: how many connects it gets per second, and until when.

    python -m benchmarks.storm                     # 1 to 100,000 gateways
    python -m benchmarks.storm --outage 60         # the relay is away for a minute
    python -m benchmarks.storm --plot storm.png    # as curves, too (needs matplotlib)

It simulates events, not sockets. What decides is the code that runs in production: `tunnel.restart_policy` in each
gateway, `relay.rates.HandshakeRate` in the relay. Only the times on the way are a model.

    fixed     the relay advises nothing, and asks every gateway that it refuses to wait for 5 seconds
    turns     the relay advises nothing, and gives each gateway that it refuses a turn: gateways of an older release
    spread    the relay has told its gateways the span and the longest backoff
    resume    the same, and the gateways keep their sessions for a minute and try to resume them
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Final, Literal, TypeAlias, final, get_args

import attrs

from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.relay.rates import HandshakeRate
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy, Restarts, RunEnd

__all__ = ["Advice", "Storm", "simulate"]

Advice: TypeAlias = Literal["fixed", "turns", "spread", "resume"]

SIZES: Final = (1, 10, 100, 1_000, 10_000, 100_000)
RATE: Final = 500.0
ROUND_TRIP: Final = 0.05
TO_THE_DOOR: Final = 3.5 * ROUND_TRIP
"""Seconds until the relay has the request: TCP, TLS and the upgrade. A proof takes another round trip."""
FIXED_WAIT: Final = 5.0
LONG_SESSION: Final = 3600.0
RESUME_TIMEOUT: Final = 60.0

MOST_BIN: Final = 3.0
"""The goal: in no second more connects than so many times the relay's rate."""
MOST_TIME: Final = 1.5
"""The goal: 99 % are back within so many times the best possible time."""

TITLES: Final = ("gateways", "most/s", "by rate", "99 %, s", "all, s", "best, s", "99 %/best", "attempts")
_BARS: Final = " ▁▂▃▄▅▆▇█"
_COLUMNS: Final = 50


@final
@attrs.frozen(kw_only=True)
class Storm:
    """What happened. Seconds count from the time when the relay takes connections again.

    Attributes:
        gateways, rate: how many lost their relay, and how many of them it takes per second.
        connects: connects that reached the relay, by second.
        back: when 99 % of the gateways were back, and when all were.
        attempts: attempts for each gateway since the loss.
    """

    gateways: int
    rate: float
    connects: Counter[int]
    back: tuple[float, float]
    attempts: float

    @property
    def most(self) -> float:
        """The most connects of a second, as a multiple of the rate."""
        return max(self.connects.values()) / self.rate

    @property
    def best(self) -> float:
        """The shortest time in which the relay could take all."""
        return self.gateways / self.rate + TO_THE_DOOR + 1.5 * ROUND_TRIP


def simulate(gateways: int, advice: Advice, *, rate: float = RATE, outage: float = 0.0, seed: int = 1) -> Storm:
    """Let gateways with the default policy lose a relay that is away for `outage` seconds."""
    random = Random(seed)
    gate = HandshakeRate(rate)
    span = gateways / rate
    spread = Spread(span=span, longest=span) if advice in {"spread", "resume"} else None
    restarts = [Restarts(RestartPolicy(), random) for _ in range(gateways)]
    redials: Counter[int] = Counter()  # that have failed, by gateway
    events: list[tuple[float, int, str]] = []
    connects: Counter[int] = Counter()
    back: list[float] = []
    attempts = 0

    def retry(
        now: float, gateway: int, *, connected_for: float | None = None, retry_after: float | None = None
    ) -> None:
        ending = RunEnd(connected_for=connected_for, retry_after=retry_after, spread=spread)
        delay = restarts[gateway].after(ending)
        assert delay is not None  # the policy never gives up
        heapq.heappush(events, (now + delay, gateway, "dials"))

    def redial(now: float, gateway: int, *, retry_after: float | None = None) -> None:
        """As `retry`, of a gateway that still has its session, or has it until the next attempt would begin."""
        if advice == "resume" and now < RESUME_TIMEOUT:
            at = now + restarts[gateway].redial_delay(redials[gateway], spread, retry_after=retry_after)
            redials[gateway] += 1
            if at < RESUME_TIMEOUT:
                heapq.heappush(events, (at, gateway, "dials"))
            elif retry_after is not None:
                retry(now, gateway, connected_for=LONG_SESSION, retry_after=retry_after)
            else:
                retry(RESUME_TIMEOUT, gateway, connected_for=LONG_SESSION)
        else:
            retry(now, gateway, retry_after=retry_after)

    for gateway in range(gateways):
        if advice == "resume":
            redial(0.0, gateway)
        else:
            retry(0.0, gateway, connected_for=LONG_SESSION)
    while events:
        now, gateway, event = heapq.heappop(events)
        if event == "dials":
            attempts += 1
            if now < outage:
                redial(now + ROUND_TRIP, gateway)
            else:
                connects[int(now - outage)] += 1
                heapq.heappush(events, (now + TO_THE_DOOR, gateway, "arrives"))
        elif event == "proves":
            gate.proved(now)
            back.append(now + ROUND_TRIP / 2 - outage)
        elif (wait := gate.wait(now)) is None:
            heapq.heappush(events, (now + ROUND_TRIP, gateway, "proves"))
        else:
            redial(now + ROUND_TRIP / 2, gateway, retry_after=FIXED_WAIT if advice == "fixed" else wait)
    return Storm(
        gateways=gateways,
        rate=rate,
        connects=connects,
        back=(back[math.ceil(0.99 * gateways) - 1], back[-1]),
        attempts=attempts / gateways,
    )


def bars(storm: Storm) -> str:
    """The connects over time as a row of bars. The highest is the goal; `!` is more than that."""
    seconds = max(storm.connects) + 1
    width = max(math.ceil(seconds / _COLUMNS), 1)
    row = ""
    for start in range(0, seconds, width):
        most = max(storm.connects[second] for second in range(start, start + width)) / storm.rate
        row += "!" if most > MOST_BIN else _BARS[math.ceil(most / MOST_BIN * (len(_BARS) - 1))]
    return f"{row}| 1 column is {width} s"


def line(storm: Storm) -> str:
    """A line of the table: figures, and whether both goals are met."""
    peak, most, (nearly_all, all_back), best = max(storm.connects.values()), storm.most, storm.back, storm.best
    met = most <= MOST_BIN and nearly_all <= MOST_TIME * best
    return (
        f"{storm.gateways:9,} {peak:9,} {most:9.2f} {nearly_all:9.1f} {all_back:9.1f} {best:9.1f}"
        f" {nearly_all / best:9.2f} {storm.attempts:9.1f}  {'yes' if met else 'no'}"
    )


def plot(storms: dict[Advice, list[Storm]], path: Path) -> None:
    """Draw the connects per second of the largest storm of each kind."""
    import matplotlib as mpl  # of the extra `bench`

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for advice, of_kind in storms.items():
        largest = of_kind[-1]
        seconds = range(max(largest.connects) + 1)
        axes.plot(seconds, [largest.connects[second] for second in seconds], label=f"{advice}: {largest.gateways:,}")
        axes.axhline(MOST_BIN * largest.rate, linestyle=":", color="grey")
    axes.set(xlabel="seconds since the relay is back", ylabel="connects per second", yscale="symlog")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm", description="How gateways come back.")
    parser.add_argument("--gateways", type=int, action="append", help="how many; may be repeated")
    parser.add_argument("--advice", choices=get_args(Advice), action="append", help="which; may be repeated")
    parser.add_argument("--rate", type=float, default=RATE, help="handshakes/s of the relay (default %(default)g)")
    parser.add_argument("--outage", type=float, default=0.0, help="seconds that it is away (default %(default)g)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the largest storms (needs matplotlib)")
    arguments = parser.parse_args()
    print(
        f"A relay that is away for {arguments.outage:g} s, and takes {arguments.rate:g} handshakes/s after that.\n"
        f"Goal: no second has more than {MOST_BIN:g} times as many connects, and 99 % are back within {MOST_TIME:g}"
        " times the best time."
    )
    storms: dict[Advice, list[Storm]] = {}
    for advice in arguments.advice or get_args(Advice):
        print(f"\n{advice}\n{' '.join(f'{title:>9}' for title in TITLES)}  goal met")
        for gateways in arguments.gateways or SIZES:
            storm = simulate(gateways, advice, rate=arguments.rate, outage=arguments.outage, seed=arguments.seed)
            storms.setdefault(advice, []).append(storm)
            print(line(storm))
        print(f"          {bars(storms[advice][-1])}")
    if arguments.plot is not None:
        plot(storms, arguments.plot)


if __name__ == "__main__":
    main()
