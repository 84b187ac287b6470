"""`make bench`: who runs, and one short run with real programs. No figure is judged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks.__main__ import GROUPS, choose, parse
from benchmarks.connections import Endpoint
from benchmarks.figures import WORDS
from benchmarks.long_path import measure_long_path
from benchmarks.machine import busy
from benchmarks.measuring import Sizes, measure
from benchmarks.peers import find
from benchmarks.processes import Process, running, wait_until
from benchmarks.race import race, start_origin
from benchmarks.visitors import percentile
from benchmarks.way import MEMORY_GROUPS, SPEED_GROUPS, Contestant, Programs, Way

TINY = Sizes(
    mib=1,
    round_trips=3,
    connections=4,
    seconds=5.0,
    http_seconds=0.05,
    streams=100,
    stalled=2,
    growth_round_trips=3,
    away=0.0,
    settle=0.01,
)


def named(name: str) -> Contestant:
    return next(each for each in find(Programs()) if each.name == name)


# Who runs


def test_those_that_are_named_run_and_by_default_all_that_can(capsys: pytest.CaptureFixture[str]) -> None:
    here = Contestant(name="here", about="", open=named("direct").open)
    absent = Contestant(name="absent", about="", open=here.open, missing="there is no absent (Debian: absent)")
    rare = Contestant(name="rare", about="", open=here.open, by_default=False)
    everybody = [here, absent, rare]
    assert choose(everybody, []) == [here]
    assert capsys.readouterr().err == "without absent: there is no absent (Debian: absent)\n"
    assert choose(everybody, ["rare"]) == [rare]
    assert not capsys.readouterr().err


def test_a_program_that_is_named_is_not_looked_for(tmp_path: Path) -> None:
    program = tmp_path / "rathole"
    found = find(Programs({"rathole": program}))
    assert all(each.missing is None for each in found if each.name.startswith("rathole-"))


def test_names_are_unique_and_their_groups_exist() -> None:
    everybody = find(Programs())
    assert len({each.name for each in everybody}) == len(everybody)
    assert all({*each.groups} <= {*GROUPS} for each in everybody)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "direct,nobody"], "--only: no nobody; there are "),
        (["--figures", "http colour"], "--figures: no colour; there are idle, "),
        (["--program", "rathole"], "invalid _program value: 'rathole'"),
        (["--peer", "other=127.0.0.1:port"], "invalid _peer value"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_a_tunnel_that_runs_already_may_take_part() -> None:
    options = parse(["--peer", "other=127.0.0.1:7172:12,13", "--only", "other"])
    [other] = choose(options.everybody, options.only)
    with other.open(("127.0.0.1", 1)) as way:
        assert way.endpoint == ("127.0.0.1", 7172)
        assert way.processes == {"relay": Process(12), "gateway": Process(13)}


# Costs


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 3.0
    assert percentile([1.0, 2.0], 99) == 2.0
    assert percentile([1.0], 50) == 1.0


def test_a_process_costs_what_its_children_cost(tmp_path: Path) -> None:
    child = "data = bytearray(64 << 20); print('ready', flush=True); input()"
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=-1).wait()"
    with running(tmp_path, "parent", [sys.executable, "-c", parent, child]) as program:

        def is_ready() -> None:
            if "ready" not in program.log:
                raise OSError("not yet")

        wait_until(is_ready, program)
        assert program.process.memory > 64
        assert program.process.cpu > 0


def test_a_process_that_has_ended_is_an_error() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ProcessLookupError, match=str(ended.pid)):
        _ = Process(ended.pid).memory


def test_a_program_that_ends_too_early_is_quoted(tmp_path: Path) -> None:
    def fails() -> None:
        raise ConnectionRefusedError

    with (
        running(tmp_path, "broken", [sys.executable, "-c", "raise SystemExit('no such option')"]) as program,
        pytest.raises(RuntimeError, match="no such option"),
    ):
        wait_until(fails, program)


# Runs


def test_a_short_run_has_all_figures_of_a_tunnel() -> None:
    failures = []

    def failed(group: str, error: Exception) -> None:
        failures.append((group, error))

    with start_origin() as origin, named("ws").open(origin) as way:
        figures = measure(way, TINY, GROUPS, failed)
    assert not failures
    beyond = {key for key in WORDS if key.endswith(("_1000", "_10000"))}  # more idle streams than here
    alone = {key for key in WORDS if key.startswith(("far_", "import_"))}
    assert figures.keys() >= WORDS.keys() - beyond - alone
    assert all(value > 0 for key, value in figures.items() if "_cpu_" not in key)  # it comes in steps of 10 ms


def test_a_race_runs_in_rounds_and_not_all_is_measured_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        Contestant(name=name, about="", open=named("direct").open, groups=groups)
        for name, groups in (("first", ("idle", "latency")), ("second", ("latency", "http")))
    )
    with start_origin() as origin:
        results = race([first, second], origin, rounds=2, sizes=TINY, groups=("idle", "latency"))
    assert not results.failures
    keys = {f"idle_{size}_p{percent}" for size in (1, 1024) for percent in (50, 99)}
    assert [figures.keys() for each in results.rounds.values() for figures in each] == [keys] * 4
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        "memory: first",
        "round 1 of 2: first",
        "round 1 of 2: second",
        "round 2 of 2: second",
        "round 2 of 2: first",
    ]


def test_a_look_at_the_machine_may_be_shorter_than_a_tick_of_the_kernel() -> None:
    assert all(0 <= busy(0) <= 1 for _ in range(20))


def test_who_does_not_come_up_is_left_out_and_named() -> None:
    def breaks(_: Endpoint) -> NoReturn:
        raise RuntimeError("it does not come up\nand this is its log")

    broken = Contestant(name="broken", about="", open=breaks, groups=("idle", "http"))
    results = race([broken], ("127.0.0.1", 1), rounds=2, sizes=TINY, groups=(*MEMORY_GROUPS, *SPEED_GROUPS))
    assert results.rounds == {"broken": [{}, {}]}
    assert results.failures == [
        "broken, memory, start: it does not come up",
        "broken, round 1 of 2, start: it does not come up",
        "broken, round 2 of 2, start: it does not come up",
    ]


def test_a_group_that_fails_leaves_the_others() -> None:
    @contextmanager
    def refused(_: Endpoint) -> Iterator[Way]:
        yield Way(endpoint=("127.0.0.1", 1))

    nobody = Contestant(name="nobody", about="", open=refused, groups=("idle", "http"))
    results = race([nobody], ("127.0.0.1", 1), rounds=1, sizes=TINY, groups=GROUPS)
    assert results.rounds == {"nobody": [{}]}
    [failure] = results.failures
    assert failure.startswith("nobody, round 1 of 1, http: ")


def test_over_a_long_path_first_bytes_take_a_round_trip() -> None:
    figures = measure_long_path(1)
    assert figures["far_first_byte"] == pytest.approx(1.0)
    assert figures["far_last_byte"] >= figures["far_first_byte"]
    assert figures["far_download"] > 1.0
    assert figures["far_download_rate"] == pytest.approx((1 << 20) / 1e6 / (figures["far_download"] * 0.05))
