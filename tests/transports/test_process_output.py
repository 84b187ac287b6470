"""Transport `process`: what a program says, up to its last words."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from base64 import b64encode
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st
from process_rig import (
    KEY,
    LINUX,
    READY,
    REAL_PROGRAMS,
    SECRET,
    connected,
    failure_of,
    no_process_left,
    programs_in,
    run_for,
)
from rig import eventually

from pioneer_tunnel._model.errors import ProcessExitedError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.transports.process.output import LINE_LIMIT, Budget, Output, Secrets

pytestmark = REAL_PROGRAMS


# Its end


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("sys.exit('cannot log in')", "'python' ended with exit status 1, saying: cannot log in"),
        ("pass", "'python' ended with exit status 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "'python' was ended by SIGKILL"),
        (READY + "print('lost', end='')", "'python' ended with exit status 0, saying: ready | lost"),
        ("[print(i) for i in range(99)]; sys.exit(7)", "exit status 7, saying: 89 | 90 | 91 |"),
    ],
)
async def test_an_end_is_told_with_its_last_words(tmp_path: Path, source: str, says: str) -> None:
    with no_process_left(tmp_path):
        error = await failure_of(run_for(tmp_path, source))
    assert isinstance(error, ProcessExitedError)
    assert not error.final
    assert says in str(error).replace("python3.11", "python").replace("python3", "python")


LEAKS: Final = """
    import base64, hashlib
    key = sys.stdin.readline().rstrip("\\n")
    raw = key.encode()
    for text in [
        key, key[:20], key[9:31], f"token={key}!", "\\x1b[1m".join(key), "\\0".join(key), key.upper(), repr(key),
        json.dumps(key),
        base64.b64encode(raw).decode(), base64.b64encode(b"user:" + raw).decode(), raw.hex(), raw.hex().upper(),
        hashlib.sha256(raw).hexdigest(), "x" * 980 + key, "y" * 4090 + key, key[:24] + "\\n" + key[24:],
    ]:
        print(text)
    print("ready", flush=True)
    sys.stderr.write(key + "\\n" + key)
"""


async def test_the_key_that_a_program_prints_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    error = await failure_of(run_for(tmp_path, LEAKS, key_on_stdin=True))
    assert isinstance(error, ProcessExitedError)
    assert "the tunnel program says: ready" in caplog.text
    assert "token=…!" in caplog.text
    for text in (str(error), caplog.text):
        for form in (SECRET, b64encode(SECRET.encode()).decode(), SECRET.encode().hex(), SECRET.upper(), repr(SECRET)):
            for start in range(len(form) - 8):
                assert form[start : start + 8] not in text
        assert hashlib.sha256(SECRET.encode()).hexdigest() not in text
    assert all(len(record.getMessage()) < 1100 for record in caplog.records)


@LINUX
@pytest.mark.parametrize("separator", ["", "\\n"])
async def test_a_program_that_prints_without_end_is_read_without_end(tmp_path: Path, separator: str) -> None:
    source = f"""
        {READY.strip()}
        for i in range(400):
            os.write(1, b"flood{separator}" * 10_000)
        open(sys.argv[1], "w").close()
        while True:
            os.write(1, b"flood{separator}" * 10_000)
    """
    done = tmp_path / "done"
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, source, str(done))):
            await eventually(done.exists)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            await trio.sleep(0.3)
            grown = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - resident
            assert grown < 8 * 1024 * 1024


@LINUX
async def test_a_program_that_closes_its_output_goes_on(tmp_path: Path) -> None:
    with no_process_left(tmp_path):
        async with connected(run_for(tmp_path, READY + "os.close(1); os.close(2); time.sleep(600)")):
            await trio.sleep(0.1)
            assert len(programs_in(tmp_path)) == 1


# What it says, without processes


@given(st.lists(st.binary(max_size=40)), st.booleans())
def test_lines_do_not_depend_on_how_they_arrive(pieces: list[bytes], every_line: bool) -> None:
    output, whole = (Output(None, Secrets(KEY)) for _ in range(2))
    lines = [line for piece in pieces for line in output.receive(piece, every_line=True)] + output.end()
    assert lines == whole.receive(b"".join(pieces), every_line=True) + whole.end()
    brief = Output(None, Secrets(KEY))
    for piece in pieces:
        brief.receive(piece, every_line=every_line)
    brief.end()
    assert brief.last_words == output.last_words == whole.last_words


def test_a_line_without_end_is_kept_in_little() -> None:
    output = Output(None, Secrets(KEY))
    for _ in range(100):
        output.receive(b"x " * 50_000)
    (line,) = output.receive(b"y\nshort")
    assert len(line) == LINE_LIMIT
    assert output.end() == [b"short"]
    assert len(output.last_words) <= 160


@given(st.text(min_size=1, max_size=60), st.text(max_size=30), st.text(max_size=30))
def test_a_key_is_hidden_whatever_stands_around_it(key: str, before: str, after: str) -> None:
    try:
        secret = RelayKey(key)
    except ValueError:
        return
    around = dict.fromkeys(map(ord, "\r\n" + secret.reveal()))
    printed = before.translate(around) + secret.reveal() + after.translate(around)
    output = Output(None, Secrets(secret))
    (line,) = output.receive(printed.encode("utf-8", "replace") + b"\n") or [b""]
    assert secret.reveal() not in output.shown(line) or secret.reveal() == "…"
    assert SECRET not in repr([output, Secrets(secret)])


def test_what_a_pattern_looks_at() -> None:
    """A line as a person sees it: whole, without colours, and only until one has matched."""
    output = Output(re.compile("^up 1$"), Secrets(KEY))
    for data in (b"up 12\n", b"up ", b"1"):
        output.receive(data)
        assert not output.matched
    output.receive(b"\x1b[0m\x1b]0;title\x07\r")
    assert output.matched


def test_a_budget() -> None:
    budget = Budget(2, now=0)
    assert [budget.spend(0.1), budget.spend(0.2), budget.spend(0.3), budget.is_over, budget.spend(0.4)] == [
        *(True, True, False, True, False)
    ]
    assert not budget.is_over
    assert budget.spend(1.1)
    assert "***" in repr(Secrets(KEY))
