"""What a node has seen of the operator's entries and of claimed names, across restarts: one SQLite file.

It is what makes a revocation last: an entry below the highest serial that this node has seen is refused, from
any source. It also answers while Redis cannot be asked. The workers of a machine share it.

The functions block: call them with `in_thread`. Several may be called at a time; one waits for the other.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar, final

import trio

from ..._model.errors import StorageError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._storage import files
from .signed import SignedEntry, serial_of

__all__ = ["SeenFile", "in_thread"]

_BUSY_SECONDS: Final = 5.0
_OPEN_SECONDS: Final = 30.0
"""Many workers of a machine may open it at once, one after the other."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, serial INTEGER NOT NULL, until REAL NOT NULL, text BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS ways (way TEXT PRIMARY KEY, id TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS ways_of ON ways (id);
CREATE TABLE IF NOT EXISTS names (host TEXT PRIMARY KEY, text BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS confirmed (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL NOT NULL);
"""

_T = TypeVar("_T")
_Arguments = ParamSpec("_Arguments")
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))


@final
class SeenFile:
    """The file. It is used while it is `opened`.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._lock: Final = threading.Lock()  # a transaction belongs to the connection, not to a thread
        self._open: sqlite3.Connection | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the file while the block runs. It is made, with mode 0600, if it does not exist. Blocks for a moment.

        Raises:
            StorageError: it cannot be made or read, holds something else, or others may write it.
        """
        files.refuse_writable(self._path)
        # SQLite fails if several processes make a file its own at once.
        with self._turn(), files.locked(self._path, seconds=_OPEN_SECONDS):
            files.create(self._path, b"")
            database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                # A power cut may undo the last writes, and damages nothing.
                database.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {_SCHEMA}")
            except BaseException:
                database.close()
                raise
        self._open = database
        try:
            yield
        finally:
            self._open = None
            with self._lock:
                database.close()

    @property
    def _database(self) -> sqlite3.Connection:
        if self._open is None:
            raise sqlite3.ProgrammingError("it is closed")
        return self._open

    # Entries

    def entry(self, tunnel_id: str) -> bytes | None:
        """The text of the highest serial about a tunnel; None if none was seen."""
        return self._one("SELECT text FROM entries WHERE id = ?", tunnel_id)

    def entry_by(self, way: str) -> bytes | None:
        """The text about the tunnel that has a key or a host, see `SignedEntry.ways`; None if none is known."""
        return self._one("SELECT text FROM entries NATURAL JOIN ways WHERE way = ?", way)

    def note(self, entry: SignedEntry) -> bytes:
        """Remember an entry, unless one with a higher serial was seen. Returns the text that counts."""
        with self._turn(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            row = self._database.execute("SELECT text FROM entries WHERE id = ?", (entry.id,)).fetchone()
            if row is not None and serial_of(row[0]) >= entry.serial:
                return bytes(row[0])
            self._database.execute("DELETE FROM ways WHERE id = ?", (entry.id,))
            self._database.executemany(
                "INSERT OR REPLACE INTO ways VALUES (?, ?)", [(way, entry.id) for way in entry.ways]
            )
            self._database.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
                (entry.id, entry.serial, entry.memorable_until, entry.text),
            )
        return entry.text

    def entries(self, after: str, most: int) -> Sequence[tuple[str, bytes]]:
        """The next texts in the order of the ids."""
        with self._turn():
            rows = self._database.execute(
                "SELECT id, text FROM entries WHERE id > ? ORDER BY id LIMIT ?", (after, most)
            )
            return [(tunnel_id, bytes(text)) for tunnel_id, text in rows]

    def confirmed(self) -> float:
        """When all entries were known to be Redis's last, in seconds since 1970; 0 if never."""
        with self._turn():
            row = self._database.execute("SELECT at FROM confirmed").fetchone()
        return 0.0 if row is None else float(row[0])

    def note_confirmed(self, at: float) -> None:
        """Remember when all entries were known to be Redis's."""
        with self._turn(), self._database:
            self._database.execute("INSERT OR REPLACE INTO confirmed VALUES (1, ?)", (at,))

    def forget_old(self, now: float) -> None:
        """Forget entries all of whose predecessors are invalid, too.

        Args:
            now: in seconds since 1970.
        """
        with self._turn(), self._database:
            self._database.execute("DELETE FROM ways WHERE id IN (SELECT id FROM entries WHERE until < ?)", (now,))
            self._database.execute("DELETE FROM entries WHERE until < ?", (now,))

    # Names

    def name(self, host: str) -> bytes | None:
        """The claim of a name; None if none was seen."""
        return self._one("SELECT text FROM names WHERE host = ?", host)

    def note_name(self, host: str, text: bytes, *, replaces: Callable[[bytes], bool]) -> bytes:
        """Remember the claim of a name, unless another one counts. Returns the text that counts.

        Args:
            host: the name.
            text: the claim.
            replaces: returns whether it counts in place of this text, which another process may have just written.
        """
        with self._turn(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            row = self._database.execute("SELECT text FROM names WHERE host = ?", (host,)).fetchone()
            if row is not None and not replaces(bytes(row[0])):
                return bytes(row[0])
            self._database.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (host, text))
        return text

    def names(self, after: str, most: int) -> Sequence[tuple[str, bytes]]:
        """The next claims in the order of their hosts."""
        with self._turn():
            rows = self._database.execute(
                "SELECT host, text FROM names WHERE host > ? ORDER BY host LIMIT ?", (after, most)
            )
            return [(host, bytes(text)) for host, text in rows]

    def _one(self, query: str, value: str) -> bytes | None:
        with self._turn():
            row = self._database.execute(query, (value,)).fetchone()
        return None if row is None else bytes(row[0])

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise StorageError(f"the state file {str(self._path)!r} cannot be used: {error}") from error

    def __repr__(self) -> str:
        return f"<SeenFile {str(self._path)!r}>"


async def in_thread(
    function: Callable[_Arguments, _T], *arguments: _Arguments.args, **keywords: _Arguments.kwargs
) -> _T | None:
    """Call a method of `SeenFile`. A file that cannot be used now, such as of a full disk, is a line in the log.

    Returns:
        What it has returned; None if the file cannot be used.
    """
    try:
        # Not to be abandoned: the file and the memory have to say the same.
        return await trio.to_thread.run_sync(partial(function, *arguments, **keywords))
    except StorageError as error:
        _log_limiter.log("state file", f"{error}", level=logging.ERROR, about=about("file_refused", reason=error))
        return None
