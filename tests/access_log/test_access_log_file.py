"""The file of an access log: renames, full disks and files that cannot be written stop nobody."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
from rig import eventually, no_hang

from pioneer_tunnel.access_log import writer
from pioneer_tunnel.access_log.entry import AccessLogFormat, Entry
from pioneer_tunnel.access_log.writer import AccessLog


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_DELAY", 0.0)
    monkeypatch.setattr(writer, "RETRY_INTERVAL", 0.01)


def entry(number: int) -> Entry:
    return Entry(time_unix=0.0, seconds=0.0, address=None, method=b"GET", path=b"/%d" % number, version=b"1.1")


def numbers(path: Path) -> list[int]:
    return [int(line.split('"GET /')[1].split()[0]) for line in path.read_text().splitlines() if line]


async def test_what_waits_at_the_end_is_written_and_only_the_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    async with log.kept():
        for number in range(100):
            log.write(entry(number))
    assert numbers(path) == [*range(100)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_cancelled_program_still_writes_what_its_streams_say_at_their_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    with trio.CancelScope() as scope:
        async with log.kept():
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                log.write(entry(1))
    assert numbers(path) == [1]


async def test_cancelled_while_it_begins_it_ends(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        async with AccessLog(tmp_path / "access.log").kept():
            raise AssertionError


async def test_after_a_rename_it_goes_on_in_a_new_file_and_loses_no_line(tmp_path: Path) -> None:
    path, old = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(path)
    async with log.kept():
        for number in range(50):
            log.write(entry(number))
            await trio.sleep(0)
        path.rename(old)
        for number in range(50, 60):
            log.write(entry(number))
        log.reopen()
        await eventually(path.exists)
        for number in range(60, 100):
            log.write(entry(number))
    assert numbers(old) + numbers(path) == [*range(100)]
    assert numbers(path) != []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")  # noqa: PTH110
async def test_a_full_disk_is_said_once_and_stops_nobody(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(path)
    with caplog.at_level(logging.WARNING, "pioneer_tunnel.access_log"):
        async with log.kept():
            for number in range(20):
                log.write(entry(number))
                await trio.sleep(0.02)
            await eventually(lambda: len(caplog.records) == 1)
            path.unlink()
            log.reopen()  # there is room again
            with no_hang():
                await eventually(lambda: len(caplog.records) == 2)
            log.write(entry(20))
    assert "No space left" in caplog.records[0].message
    assert "lines that are missing: " in caplog.records[1].message
    assert numbers(path)[-1] == 20


async def test_a_file_that_cannot_be_opened_is_tried_again(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    log = AccessLog(folder / "access.log")
    async with log.kept():
        assert "No such file" in caplog.text
        log.write(entry(1))
        await eventually(lambda: log._dropped == 1)
        folder.mkdir()
        log.write(entry(2))
        await eventually((folder / "access.log").exists)
    assert numbers(folder / "access.log") == [2]


async def test_nobody_waits_for_a_file_that_blocks(tmp_path: Path) -> None:
    """A pipe that nobody reads: what does not fit is dropped."""
    path = tmp_path / "access.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log = AccessLog(path)
        with no_hang():
            async with log.kept():
                for number in range(20_000):
                    log.write(entry(number))
        assert os.read(reader, 100).startswith(b"- - -")
    finally:
        os.close(reader)


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writer, "MOST_WAITING", 10)
    log = AccessLog(tmp_path / "access.log", AccessLogFormat.COMMON)
    async with log.kept():
        for number in range(100):
            log.write(entry(number))
    assert numbers(tmp_path / "access.log") == [*range(10)]


async def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    """The disk is full in the middle of a line, and has room again later."""
    path = tmp_path / "access.log"
    log = AccessLog(path)
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            real(descriptor, data[:10])
            os.write = full  # type: ignore[assignment]
            return 10
        return real(descriptor, data)

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    try:
        async with log.kept():
            os.write = half  # type: ignore[assignment]
            log.write(entry(1))
            await eventually(lambda: os.write is full)
            os.write = real
            log.write(entry(2))
    finally:
        os.write = real
    first, second = path.read_text().splitlines()
    assert len(first) == 10
    assert '"GET /2 ' in second


ONE_OF_SEVERAL: Final = """
import os, pathlib, sys, trio
from pioneer_tunnel.access_log import writer
from pioneer_tunnel.access_log.entry import Entry

real, count = os.write, 0

def piece(descriptor, data):
    global count
    count += 1
    if count % 7 == 3:
        raise OSError(28, "No space left on device")
    return real(descriptor, data[:50])

async def main():
    log = writer.AccessLog(pathlib.Path(sys.argv[1]), shared=True)
    async with log.kept():
        os.write = piece
        for _ in range(200):
            path = b"/" + sys.argv[2].encode() * 100
            log.write(Entry(time_unix=0.0, seconds=0.0, address=None, method=b"GET", path=path, version=b"1.1"))
            await trio.sleep(0.001)
        os.write = real

writer.BATCH_DELAY = writer.RETRY_INTERVAL = 0.0
trio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no processes share a log there")
async def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    """Each process writes piece by piece, and its disk is full now and then, in the middle of a line."""
    path = tmp_path / "access.log"
    async with trio.open_nursery() as nursery:
        for name in "abc":
            command = [sys.executable, "-c", ONE_OF_SEVERAL, str(path), name]
            nursery.start_soon(partial(trio.run_process, command, capture_stderr=True))
    lines = path.read_text().splitlines()
    assert len(lines) > 100
    whole = re.compile(r'- - - \[.*\] "GET /(a{100}|b{100}|c{100}) HTTP/1.1" .*')
    assert [line for line in lines if not whole.fullmatch(line)] == []
