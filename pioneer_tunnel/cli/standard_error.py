"""Standard error of our commands: a thread writes it, so that it never stops or delays traffic.

Standard error may be a full disk, a pipe that is not read, or closed. Then a write fails, or blocks for any time. So
all output of a command (status lines, the log, tracebacks) goes to a queue of bounded size, which a daemon thread
writes. When the queue is full, or a write fails, lines are dropped and counted. The count is written as soon as a write
succeeds.

The descriptor does not become non-blocking: `O_NONBLOCK` would apply to other processes that share it.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO, final

from .._model.log_fields import LOG_FIELDS

__all__ = ["JsonFormatter", "QueuedStream", "queue_standard_error", "write_json_lines"]

MAX_QUEUED: Final = 256 * 1024
"""Characters that the queue may hold; further output is dropped."""

EXIT_TIMEOUT: Final = 2.0
"""Seconds that the process waits at exit for the queue to empty."""


@final
class QueuedStream(io.TextIOBase):
    """A text stream whose `write` never blocks and never fails.

    Args:
        stream: the thread writes to its descriptor.

    Attributes:
        describe_drop: makes the line that reports a number of dropped lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self.describe_drop: Callable[[int], str] = _describe_drop
        self._stream: Final = stream
        self._descriptor: Final = stream.fileno()
        self._changed: Final = threading.Condition()
        self._queue: Final[deque[tuple[int, str]]] = deque()  # each text with the number of lines dropped before it
        self._queued = 0
        self._dropped = 0
        self._writing = False
        threading.Thread(target=self._write_queue, name="standard error", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has it as a variable
        """The encoding of the stream below."""
        return self._stream.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]  # as above
        """How characters are written that the encoding lacks: as escapes."""
        return "backslashreplace"

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream below. Writing to it directly may block."""
        return self._descriptor

    def write(self, text: str, /) -> int:
        """Queue `text`, or drop it when the queue is full.

        Raises:
            TypeError: it is not text. click writes bytes to test for a binary stream.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a str, not {type(text).__name__}")
        with self._changed:
            if self._queued + len(text) > MAX_QUEUED:
                self._dropped += text.count("\n")
            else:
                self._enqueue(text)
        return len(text)

    def drain(self, timeout: float) -> None:
        """Wait until the queue is empty, at most `timeout` seconds."""
        with self._changed:
            if self._dropped:
                self._enqueue("")
            self._changed.wait_for(lambda: not self._queue and not self._writing, timeout)

    def _enqueue(self, text: str) -> None:
        self._queue.append((self._dropped, text))
        self._queued += len(text)
        self._dropped = 0
        self._changed.notify_all()

    def _write_queue(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                dropped, text = self._queue.popleft()
                self._queued -= len(text)
                self._writing = True
            written = self._write(self.describe_drop(dropped) + text if dropped else text)
            with self._changed:
                self._writing = False
                if not written:
                    self._dropped += dropped + text.count("\n")
                elif self._dropped and not self._queue:
                    self._enqueue("")
                self._changed.notify_all()

    def _write(self, text: str) -> bool:
        data = text.encode(self.encoding, self.errors)
        try:
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # another process has set O_NONBLOCK
                    select.select([], [self._descriptor], [])
        except OSError:
            return False
        return True


@final
class JsonFormatter(logging.Formatter):
    """Log lines as JSON objects: `log` (the text), `level`, `logger`, `time_unix`, and its `LOG_FIELDS`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "log": super().format(record),
            "level": record.levelname,
            "logger": record.name,
            "time_unix": int(record.created),
        }
        fields = {name: value for name in LOG_FIELDS if (value := getattr(record, name, None)) is not None}
        return json.dumps(line | fields)


def queue_standard_error() -> None:
    """Replace `sys.stderr` by a `QueuedStream`. Only for our commands: a host must not call this."""
    _occupy_standard_descriptors()
    if sys.stderr is None:  # it was closed when Python started
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # it stays open
    stream = QueuedStream(sys.stderr)
    sys.stderr = stream
    atexit.register(stream.drain, EXIT_TIMEOUT)


def write_json_lines(handler: logging.Handler) -> None:
    """Write log lines of `handler`, and reports of dropped lines, as JSON objects, one on each line."""
    handler.setFormatter(JsonFormatter())
    if isinstance(sys.stderr, QueuedStream):
        sys.stderr.describe_drop = _describe_drop_in_json


def _occupy_standard_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed, so that no socket gets one and receives our output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _describe_drop(lines: int) -> str:
    return f"lines of output that could not be written and were dropped: {lines}\n"


def _describe_drop_in_json(lines: int) -> str:
    return json.dumps({"dropped_lines": lines}) + "\n"
