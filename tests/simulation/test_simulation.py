"""Some simulated days (`make soak` runs thousands), and planted bugs that a day must find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio

from pioneer_tunnel import TunnelAuthError, TunnelError
from pioneer_tunnel._model.status import State
from pioneer_tunnel.gateway.generation import Generation
from pioneer_tunnel.testing import FaultPlan, Leave, Up
from pioneer_tunnel.testing.memory_stream import MemoryConnection, MemoryStream
from pioneer_tunnel.testing.virtual_time import virtual_time
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.restart_policy import Restarts
from pioneer_tunnel.tunnel.supervisor import Supervisor
from pioneer_tunnel.yamux import YamuxConnection

from . import Day, Report, Speech, Talk, day as days, make_day, run_day
from .__main__ import main
from .conversation import HEADER_SIZE, Conversation, Outcome, number_in

TESTS: Final = Path(__file__).parents[1]
HOURS: Final = 1.0
FIRST_FEW: Final = range(4)


@pytest.mark.parametrize("seed", FIRST_FEW)
def test_a_day_of_faults_is_survived(seed: int) -> None:
    report = run_day(make_day(seed, hours=HOURS))
    assert report.failure is None, str(report)
    assert report.counts["visitors: whole"] > 0
    assert report.counts["dials"] > 1


# The same again


def test_a_seed_always_makes_the_same_day_and_another_one_another() -> None:
    assert make_day(7) == make_day(7)
    assert make_day(7) != make_day(8)


def test_a_day_prints_as_the_code_for_it() -> None:
    day = make_day(7)
    names = {name: getattr(days, name) for name in days.__all__}
    assert (
        eval(repr(day), {**vars(sys.modules["pioneer_tunnel.testing"]), "Speech": Speech, "Talk": Talk, **names}) == day
    )


def test_the_same_day_leaves_the_same_trace_also_in_another_process_with_other_hashes() -> None:
    here, again = run_day(make_day(3, hours=HOURS)), run_day(make_day(3, hours=HOURS))
    assert here.trace == again.trace
    assert here.digest == again.digest != run_day(make_day(4, hours=0.5)).digest
    command = [sys.executable, "-m", "simulation", "--seed", "3", "--hours", str(HOURS)]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert here.digest in done.stdout


# What it finds


def first_failure(seeds: Iterable[int] = FIRST_FEW) -> Report:
    for seed in seeds:
        report = run_day(make_day(seed, hours=HOURS))
        if report.failure is not None:
            return report
    raise AssertionError("nothing was found")


def plant(patch: pytest.MonkeyPatch, owner: type, name: str, bug: Callable[..., Any]) -> None:
    """Replace a method by `bug`, which gets the real method as its first argument."""
    real = getattr(owner, name)

    def planted(*args: Any, **kwargs: Any) -> Any:
        return bug(real, *args, **kwargs)

    patch.setattr(owner, name, planted)


def test_a_break_that_is_passed_off_as_an_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive_some(real: Any, stream: TunnelStream, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data: bytes | bytearray = await real(stream, max_bytes)
        except trio.BrokenResourceError:
            return b""
        return data

    plant(monkeypatch, TunnelStream, "receive_some", receive_some)
    assert "was told of an end" in str(first_failure().failure)


def test_an_answer_whose_end_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send_all(real: Any, stream: TunnelStream, data: bytes) -> None:
        await real(stream, data[:-1] if len(data) > 10_000 else data)

    plant(monkeypatch, TunnelStream, "send_all", send_all)
    assert "the visitor was told of an end after" in str(first_failure().failure)


def test_a_gateway_that_tries_again_after_a_final_failure_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep_up(real: Any, supervisor: Supervisor, links: trio.Nursery) -> TunnelError:
        failure: TunnelError = await real(supervisor, links)
        supervisor._publish(State.FAILED, failure)
        await trio.sleep(5)
        return await real(supervisor, links)  # type: ignore[no-any-return]

    plant(monkeypatch, Supervisor, "_keep_up", keep_up)
    assert "it dialled at" in str(first_failure().failure)


def test_a_rejected_key_that_is_taken_for_a_passing_trouble_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunnelAuthError, "final", False)
    assert "tunnel_auth_failed" in str(first_failure().failure)


def test_a_gateway_that_gives_up_without_need_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Restarts, "after", lambda real, *args: None if real(*args) > 5 else real(*args))
    assert "it gave up without a reason" in str(first_failure().failure)


def test_a_status_that_stays_connected_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(real: Any, supervisor: Supervisor, state: State, *args: Any, **kwargs: Any) -> None:
        if state is not State.RECONNECTING:
            real(supervisor, state, *args, **kwargs)

    plant(monkeypatch, Supervisor, "_publish", publish)
    assert "'connected'" in str(first_failure().failure)


def test_a_session_that_is_kept_at_each_reconnect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    async def run(real: Any, connection: YamuxConnection) -> None:
        kept.append(connection)
        await real(connection)

    plant(monkeypatch, YamuxConnection, "run", run)
    assert any(what in str(first_failure().failure) for what in ("memory grows", "all is quiet"))


def test_a_task_that_is_left_by_visitors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(real: Any, generation: Generation, stream: TunnelStream) -> None:
        real(generation, stream)
        generation._tasks.start_soon(trio.sleep_forever)

    plant(monkeypatch, Generation, "_deliver", deliver)
    assert "a task is left behind" in str(first_failure().failure)


def test_a_handler_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leg(real: Any, stream: TunnelStream) -> None:
        raise RuntimeError("planted")

    plant(monkeypatch, TunnelStream, "leg", leg)
    assert "has an error" in str(first_failure().failure)


def test_a_gateway_that_does_not_come_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(real: Any, supervisor: Supervisor, delay: float, failure: Any) -> None:
        await real(supervisor, delay * 1000, failure)

    plant(monkeypatch, Supervisor, "_wait", wait)
    assert "it is not well" in str(first_failure([8]).failure)  # before, sleep and other networks end its waits


# A conversation by itself


def talked(talk: Talk, befall: Callable[[MemoryConnection], None] = lambda connection: None) -> tuple[Any, list[str]]:
    """Run a conversation over a connection, and call `befall` with it after 5 seconds."""
    complaints: list[str] = []

    @virtual_time
    async def run() -> Conversation:
        connection = MemoryConnection()
        conversation = Conversation(7, talk, complain=complaints.append, hurry=trio.Event())

        async def answer(stream: MemoryStream) -> None:
            assert await number_in(stream) == 7
            await conversation.answer(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(conversation.visit, connection.client)
            nursery.start_soon(answer, connection.server)
            await trio.sleep(5)
            befall(connection)
        return conversation

    return run(), complaints


def test_a_conversation_is_whole_when_both_have_heard_everything() -> None:
    conversation, complaints = talked(Talk(0.0, Speech(3, 100_000, pause=1.0), Speech(2, 70_000, last=True)))
    assert conversation.whole
    assert not complaints
    assert (conversation.visitor.heard, conversation.gateway.heard) == (140_000, 300_000)


def test_a_conversation_that_breaks_is_honest() -> None:
    conversation, complaints = talked(
        Talk(0.0, Speech(3, 100, pause=4.0), Speech(3, 10, pause=4.0)), MemoryConnection.cut
    )
    assert not complaints
    assert conversation.visitor.outcome is conversation.gateway.outcome is Outcome.BROKEN
    assert conversation.gateway.heard == 200


@pytest.mark.parametrize("leave", [Leave.CLOSE, Leave.RESET])
def test_who_leaves_does_not_hear_the_rest(leave: Leave) -> None:
    conversation, complaints = talked(Talk(0.0, Speech(2, 100, pause=1.0, leave=leave), Speech(5, 10, pause=9.0)))
    assert not complaints
    assert conversation.visitor.outcome is Outcome.LEFT
    assert not conversation.whole


def test_a_part_that_is_passed_off_as_the_whole_is_complained_of() -> None:
    def end(connection: MemoryConnection) -> None:
        connection._directions[0].end()

    _, complaints = talked(Talk(0.0, Speech(3, 100, pause=4.0)), end)
    assert "the gateway was told of an end after 200 bytes, while the visitor had begun to say 200" in complaints[0]


def test_other_bytes_are_complained_of() -> None:
    def scribble(connection: MemoryConnection) -> None:
        connection._directions[0]._bytes_arrive(b"\0" * HEADER_SIZE)

    _, complaints = talked(Talk(0.0, Speech(2, 100, pause=9.0)), scribble)
    assert "the gateway has heard more than was said" in complaints[0]


# The command line


def test_it_reports_a_day_and_how_to_have_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--hours", "0.2"]) == 0
    assert "all was as it has to be" in capsys.readouterr().out


def test_it_stops_at_the_first_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TunnelAuthError, "final", False)
    assert main(["--seed", "0", "--hours", "1", "--soak", "1000"]) == 1
    told = capsys.readouterr()
    seed = told.err.split()[-1]
    assert f"again: PYTHONPATH=tests python -m simulation --seed {seed} --hours 1" in told.out
    assert "FAILED: " in told.out


def test_it_prints_a_day_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--hours", "0.2", "--show"]) == 0
    assert capsys.readouterr().out == f"{make_day(3, hours=0.2)!r}\n"


def test_a_day_can_be_made_by_hand() -> None:
    day = Day(5, 0.1, acts=(days.At(10.0, days.Storm(FaultPlan([Up(5.0)]))),), talks=(Talk(12.0),))
    report = run_day(attrs.evolve(day, forwards=True))
    assert report.failure is None
    assert "Storm(FaultPlan([Up(5.0)]))" in "\n".join(report.trace)
