"""`QueuedStream`: a write never blocks and never fails, and what is dropped is counted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Final, TextIO, cast

import click
import pytest

from pioneer_tunnel.cli.standard_error import MAX_QUEUED, JsonFormatter, QueuedStream

LINE: Final = "x" * 1023 + "\n"
LONG: Final = 20.0
"""Seconds; nothing here waits for so long unless it fails."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe that is not read, as a descriptor and a stream."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        yield reader, stream
    with contextlib.suppress(OSError):
        os.close(reader)


def read_until(reader: int, end: bytes) -> bytes:
    read = b""
    while not read.endswith(end):
        data = os.read(reader, 65536)
        assert data
        read += data
    return read


def test_what_is_written_arrives_in_order(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    queued = QueuedStream(stream)
    assert queued.write("one\n") == 4
    print("two", file=queued, flush=True)
    click.echo(click.style("thr\u00e9e \udc80", fg="red"), file=cast("TextIO", queued))
    queued.drain(LONG)
    assert os.read(reader, 1024) == "one\ntwo\nthr\u00e9e \\udc80\n".encode()


def test_it_is_a_text_stream_of_the_same_kind_as_the_one_below(pipe: tuple[int, TextIO]) -> None:
    _, stream = pipe
    queued = QueuedStream(stream)
    assert (queued.encoding, queued.isatty(), queued.fileno()) == ("utf-8", False, stream.fileno())
    assert queued.writable()
    with pytest.raises(TypeError, match="bytes"):
        queued.write(b"")  # type: ignore[arg-type]


def test_a_pipe_that_is_not_read_blocks_no_write_and_loses_what_is_too_much(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    queued = QueuedStream(stream)
    total = 2 * MAX_QUEUED // len(LINE) + 1024  # more than queue and pipe hold
    for _ in range(total):
        queued.write(LINE)
    queued.drain(0.01)
    read, arrived, dropped = b"", 0, 0
    while arrived + dropped < total:  # the thread may report what was dropped more than once
        read += os.read(reader, 65536)
        *lines, read = read.split(b"\n")
        reports = [int(line.rpartition(b"dropped: ")[2]) for line in lines if b"dropped: " in line]
        arrived, dropped = arrived + len(lines) - len(reports), dropped + sum(reports)
    assert dropped
    assert (arrived + dropped, read) == (total, b"")
    queued.write("and on\n")
    assert read_until(reader, b"on\n") == b"and on\n"


def test_what_cannot_be_written_is_counted_and_told_when_it_can() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        queued = QueuedStream(full)
        queued.write("one\ntwo\n")
        queued.drain(LONG)
        reader, writer = os.pipe()
        os.dup2(writer, full.fileno())  # the disk has space again
        os.close(writer)
        queued.write("three\n")
        queued.drain(LONG)
        assert os.read(reader, 1024) == b"lines of output that could not be written and were dropped: 2\nthree\n"
        os.close(reader)


def test_without_a_reader_it_goes_on(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    queued = QueuedStream(stream)
    os.close(reader)
    for _ in range(3):
        queued.write("one\n")
        queued.drain(LONG)


def test_a_descriptor_that_another_process_has_made_non_blocking_is_waited_for(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while os.write(stream.fileno(), b"."):
            pass
    queued = QueuedStream(stream)
    queued.write("one\n")
    queued.drain(0.01)
    assert read_until(reader, b"\n").lstrip(b".") == b"one\n"
    assert not select.select([reader], [], [], 0)[0]


def test_log_lines_for_machines_have_the_traceback_and_stay_one_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("a.logger", logging.ERROR, "", 1, "it %s", ("failed",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["log"].startswith("it failed\nTraceback")
    assert told["log"].endswith("ValueError: why")
    assert (told["level"], told["logger"]) == ("ERROR", "a.logger")
    assert told["time_unix"] == int(record.created)
