"""TLS with half-close, for connections that are a visitor's from end to end.

`trio.SSLStream` ends both directions at once. HTTP does not mind, but a visitor that sends a request, sends EOF and
waits for the answer does. In TLS a `close_notify` is about one direction (RFC 8446, 6.1), and the relays of this
protocol pass it on. EOF of the connection without a `close_notify` is a break.

Visitors of the web are laxer: many just close. With `https` that counts as EOF, as for every web server. A
`close_notify` is still sent to them, so that they can tell a whole answer from a truncated one; `trio.SSLStream` has
both or neither. `TlsServerStream` is the same without half-close, which a relay's visitors have little use for.

Some records carry no data: TLS 1.3 key updates, session tickets, empty records, attempts to renegotiate. Each costs
work, and OpenSSL queues a reply to some of them. So records are given to OpenSSL one by one and counted:

- a connection breaks when it has sent more than 32 records without data; each record with data makes up for one;
- at most 64 records are processed before other tasks run;
- replies are sent when the connection takes them. It breaks when more than 64 KiB of them wait.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar, final

import trio

from ..adopted import adopt
from ..leg import Bytes, Leg
from ..streams import DelegatingStream, Nowait
from .alerts import describe
from .certificate import certificate_hash
from .client import blocks
from .leg import TlsLeg

__all__ = ["TlsServerStream", "TlsStream"]

_RECEIVE_SIZE: Final = 128 * 1024
_BATCH: Final = 128 * 1024
_RECORD: Final = 16 * 1024
_WIRE_SIZE: Final = 64 * 1024
_SMALL: Final = 4 * 1024
_UNREAD_LIMIT: Final = 2**30
_GOODBYE_TIMEOUT: Final = 30.0

_HEADER: Final = 5
_RECORD_TYPES: Final = frozenset(range(20, 25))
_LARGEST_RECORD: Final = _HEADER + _RECORD + 2048
_RECORDS_PER_TURN: Final = 64
_MOST_EMPTY_RECORDS: Final = 32
_MOST_REPLIES: Final = 64 * 1024
_REPLY_TIMEOUT: Final = 1.0
_MOST_THREADS: Final = 8

_T = TypeVar("_T")
_threads: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("pioneer_tunnel: threads for handshakes")


@final
class TlsStream(DelegatingStream):
    """TLS over `stream`, which is closed with it. Nothing works before `do_handshake`.

    Args:
        stream: the connection.
        context: the trusted authorities, or the certificate.
        server_hostname: the name that a client checks.
        server_side: whether this is the server.
        session: of an earlier connection to the same server, to resume it.
        https: EOF of the connection counts as EOF also without `close_notify`, and `send_eof` also ends the
            connection's sending half.

    Attributes:
        beginning: the first bytes that the peer sent, as far as the handshake took them; they may be no TLS.
        end_received: whether the peer has sent EOF.
        end_sent: whether this end has sent EOF, or has queued it.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        server_side: bool = False,
        session: ssl.SSLSession | None = None,
        https: bool = False,
    ) -> None:
        super().__init__(adopt(stream))
        self._incoming: Final = ssl.MemoryBIO()
        self._outgoing: Final = ssl.MemoryBIO()
        self._wrap: Final = functools.partial(
            context.wrap_bio,
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
            session=session,
        )
        self._blocking: Final = blocks(context)
        self._tls: ssl.SSLObject
        if not self._blocking:
            self._tls = self._wrap()
        self._https: Final = https
        self._to_wire: Final = trio.StrictFIFOLock()
        self._received: Final = bytearray()  # records that OpenSSL has not been given yet
        self._record_is_new = False
        self._empty_records = 0
        self._replies = 0  # bytes
        self._rest: Bytes = b""  # was encrypted, and `_send_outgoing_nowait` has not sent it
        self._watched: Nowait | None = None  # the connection, while it is watched
        self._buffer: memoryview | None = None  # for what is received from it
        self.drained = False
        self._ahead = b""
        self.end_sent = False
        self.beginning = b""
        self.end_received = False

    @property
    def session(self) -> ssl.SSLSession | None:
        """To be passed to the next connection; some servers send it only with the first data.

        Read it seldom: with Python 3.11 and OpenSSL 3.0 each read leaks 6 KB.
        """
        return self._tls.session

    @property
    def session_reused(self) -> bool:
        """Whether the peer resumed the given session."""
        return bool(self._tls.session_reused)

    @property
    def version(self) -> str | None:
        """The version of TLS that both ends agreed on, such as `TLSv1.3`."""
        return self._tls.version()

    @property
    def peer_certificates(self) -> list[bytes]:
        """The peer's certificate, DER, and after it the chain to a trusted authority (from Python 3.13 on).

        Of a session that was resumed, only the certificate is known.
        """
        if hasattr(self._tls, "get_verified_chain") and self._tls.context.verify_mode is not ssl.CERT_NONE:
            chain = [*self._tls.get_verified_chain()]
            if chain:  # a resumed session has none
                return chain
        own = self._tls.getpeercert(binary_form=True)
        return [] if own is None else [own]

    async def do_handshake(self) -> None:
        """Agree on keys and check the peer's certificate. The caller sets the deadline. If cancelled, only close it.

        Raises:
            trio.BrokenResourceError: the handshake failed; the cause is an `ssl.SSLError` if TLS was the reason.
        """
        if self._blocking:
            self._tls = await _in_thread(self._wrap)
        while True:
            try:
                if self._blocking:
                    await _in_thread(self._tls.do_handshake)
                else:
                    self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self.beginning = self.beginning or bytes(self._received[:_HEADER])
                if self._feed():
                    await trio.lowlevel.checkpoint()
                else:
                    await self._fill()
            except ssl.SSLError as error:
                await self._flush()  # the alert for the peer
                raise trio.BrokenResourceError(f"TLS failed: {error.reason or error}") from error
            else:
                self._empty_records = 0
                await self._flush()
                return

    @property
    def can_half_close(self) -> bool:
        return True

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        max_bytes = _RECEIVE_SIZE if max_bytes is None else max_bytes
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            data = self.take_decrypted(max_bytes)
            if data or self.end_received:
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            await self._reply()
            await self._fill()
            waited = True

    def leg(self) -> Leg | None:
        return self.make_leg(half_close=True)

    def make_leg(self, *, half_close: bool) -> Leg | None:
        """This stream as a leg over that of the connection. See `TlsLeg`."""
        if self._to_wire.locked():
            return None  # a task sends a reply. Asked first: the leg below would take what was read ahead.
        below = self.transport_stream.leg()
        return None if below is None else TlsLeg(self, below, half_close=half_close)

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:
        self._watched = self.transport_stream.watch(on_readable)
        if self._watched is None:
            return None
        self._buffer = memoryview(bytearray(_WIRE_SIZE))
        return self

    def unwatch(self) -> None:
        if self._watched is not None:
            self._watched.unwatch()
            self._watched = self._buffer = None

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        watched, wire = self._watched, self._buffer
        if watched is None or wire is None:
            raise trio.ClosedResourceError("this stream was closed")
        done, self.drained = 0, False
        while True:
            try:
                if self._ahead:
                    done = len(data := self._read_ahead(len(buffer)))
                    buffer[:done] = data
                else:
                    done += self._decrypt_into(buffer[done:] if done else buffer)
                if done == len(buffer) or self.end_received:
                    return done
                if self.owes_reply and not self._to_wire.locked():
                    self._send_outgoing_nowait(watched)
                if done and watched.drained:
                    self.drained = not self._received
                    return done
                received = watched.receive_into_nowait(wire)
            except trio.BrokenResourceError:
                if done:
                    return done  # the next call raises it again
                raise
            if received is None:
                return done or None
            self.take_received(wire[:received])

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        watched = self._watched
        if watched is None or self._to_wire.locked():
            return [*pieces]
        if self.end_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")
        left = [*pieces]
        while self._send_outgoing_nowait(watched):
            if not left:
                return []
            count, size = 0, 0
            while count < len(left) and size < _BATCH:
                size += len(left[count])
                count += 1
            self._encrypt_all(left[:count])
            del left[:count]
        # The caller calls again, or sends the rest; if that is empty, this sends what is encrypted already.
        return left or [b""]

    def _send_outgoing_nowait(self, watched: Nowait) -> bool:
        """Send what is encrypted, as far as the connection takes it at once. False if some is left."""
        replies = self._replies
        while data := self.take_outgoing():
            rest = watched.send_nowait([data])
            if rest:
                self._rest, self._replies = rest[0], replies
                return False
        return True

    def take_decrypted(self, max_bytes: int) -> bytes:
        """Take what is decrypted, or can be; b"" if no complete record has come, and at EOF, see `end_received`.

        Raises:
            trio.BrokenResourceError: TLS is broken.
        """
        return self._read_ahead(max_bytes) if self._ahead else self._decrypt(max_bytes)

    @property
    def has_more(self) -> bool:
        """Whether `take_decrypted` may return something without another `take_received`."""
        return bool(self._ahead or self._received or self.end_received or self._tls.pending())

    @property
    def owes_reply(self) -> bool:
        """Whether OpenSSL has a reply to what was read. See the module.

        Raises:
            trio.BrokenResourceError: too much of them waits.
        """
        if self._replies > _MOST_REPLIES:
            raise trio.BrokenResourceError("TLS: the other end asks for replies and does not take them")
        return self._replies > 0

    def _read_ahead(self, max_bytes: int) -> bytes:
        data, self._ahead = self._ahead[:max_bytes], self._ahead[max_bytes:]
        return data

    def _decrypt(self, max_bytes: int, *, records: int = _RECORDS_PER_TURN) -> bytes:
        """Decrypt the complete records that have arrived; b"" if there are none, and at EOF.

        Args:
            records: how many may be given to OpenSSL, in addition to what it has.
        """
        pieces: list[bytes] = []

        def read(done: int) -> int:
            piece = self._tls.read(min(max_bytes - done, _RECORD))
            pieces.append(piece)
            return len(piece)

        self._read_records(read, max_bytes, records)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decrypt_into(self, buffer: memoryview) -> int:
        """Like `_decrypt`, into `buffer`; returns the number of bytes."""

        def read(done: int) -> int:
            amount: int = self._tls.read(_RECORD, buffer[done:])  # type: ignore[assignment]  # with a buffer
            return amount

        return self._read_records(read, len(buffer), _RECORDS_PER_TURN)

    def _read_records(self, read: Callable[[int], int], size: int, records: int) -> int:
        """Call `read`, with the number of bytes so far, until there are `size` bytes, or no more complete records."""
        done, waiting, more = 0, self._outgoing.pending, True
        try:
            while done < size and more:
                try:
                    amount = read(done)
                except ssl.SSLWantReadError:
                    self._note_record(empty=True)
                else:
                    if not amount:
                        self.end_received = True
                        break
                    self._note_record(empty=False)
                    done += amount
                    if self._tls.pending():
                        continue
                more = records > 0 and self._feed()
                records -= 1
        except ssl.SSLZeroReturnError:
            self.end_received = True
        except ssl.SSLError as error:
            if self._https and isinstance(error, ssl.SSLEOFError):
                self.end_received = True
            elif not done:
                raise trio.BrokenResourceError(f"TLS broke off: {describe(error)}") from error
        finally:
            self._replies += self._outgoing.pending - waiting
        if self._empty_records > _MOST_EMPTY_RECORDS and not done:
            raise trio.BrokenResourceError(f"TLS: more than {_MOST_EMPTY_RECORDS} records came without data")
        return done

    def _note_record(self, *, empty: bool) -> None:
        """Count the record that OpenSSL was given last, once."""
        if self._record_is_new:
            self._record_is_new = False
            self._empty_records = self._empty_records + 1 if empty else max(self._empty_records - 1, 0)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.end_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")
        with memoryview(data) as view:
            for start in range(0, len(view), _BATCH):
                self.encrypt(view[start : start + _BATCH])
                try:
                    await self._flush()
                except trio.BrokenResourceError:
                    await self._raise_alert()
                    raise
            if not view:
                await self._flush()
                await self.transport_stream.send_all(b"")

    async def send_pieces(self, pieces: Sequence[Bytes]) -> None:
        if self.end_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")
        self._encrypt_all(pieces)
        await self._flush()

    def _encrypt_all(self, pieces: Sequence[Bytes]) -> None:
        """Encrypt `pieces`, small ones together: a record has 22 bytes more than its content."""
        small: list[Bytes] = []
        for piece in pieces:
            if len(piece) < _SMALL:
                small.append(piece)
                continue
            if small:
                self.encrypt(b"".join(small))
                small = []
            self.encrypt(piece)
        if small:
            self.encrypt(b"".join(small))

    def encrypt(self, data: Bytes) -> None:
        """Encrypt `data`; `take_outgoing` returns it.

        Raises:
            trio.BrokenResourceError: TLS is broken.
        """
        with memoryview(data) as view:
            sent = 0
            try:
                while sent < len(view):
                    sent += self._tls.write(view[sent:])
            except ssl.SSLError as error:
                raise trio.BrokenResourceError(f"TLS broke off: {describe(error)}") from error

    async def _raise_alert(self) -> None:
        """Raise the alert that the peer sent before the connection broke, if it did.

        In TLS 1.3 a server that refuses the client says so when the client's handshake is over, and closes. Then the
        client learns of the broken connection by its first send, and the alert still waits to be read.
        """
        # What has arrived is there at once. A task that is receiving gets the alert itself.
        with trio.move_on_after(_REPLY_TIMEOUT), suppress(trio.BusyResourceError):
            while not self._ahead and not self.end_received:
                await self._fill()
                self._ahead = self._decrypt(_RECORD)

    async def wait_send_all_might_not_block(self) -> None:
        async with self._to_wire:  # `_reply` may be sending
            await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if self.end_sent:
            await trio.lowlevel.checkpoint()
            return
        ends_connection = self.begin_end()
        await self._flush()
        if ends_connection and self.transport_stream.can_half_close:
            await self.transport_stream.send_eof()

    def begin_end(self) -> bool:
        """Queue EOF. Returns whether the sending half of the connection is to be ended after it."""
        self.end_sent = True
        self._send_close_notify()
        return self._https

    def _send_close_notify(self) -> None:
        # `unwrap` looks for the peer's close_notify at once, and fails if it finds data. So that data is read first.
        with suppress(trio.BrokenResourceError):
            self._ahead += self._decrypt(_UNREAD_LIMIT, records=0)
        with suppress(ssl.SSLError):
            # It wants to read the peer's close_notify, which comes later; or TLS is broken, and the next read raises.
            self._tls.unwrap()

    async def aclose(self) -> None:
        try:
            if not self.end_sent and hasattr(self, "_tls"):
                self.end_sent = True
                with trio.move_on_after(_GOODBYE_TIMEOUT):
                    self._send_close_notify()
                    await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await self.transport_stream.aclose()

    def _feed(self) -> bool:
        """Give OpenSSL the next record; False if there is no complete one.

        Bytes that do not look like a record are passed on for OpenSSL to refuse.
        """
        received = self._received
        if len(received) < _HEADER:
            return False
        length = _HEADER + int.from_bytes(received[3:_HEADER], "big")
        if received[0] not in _RECORD_TYPES or received[1] != 3 or length > _LARGEST_RECORD:
            length = len(received)
        elif len(received) < length:
            return False
        with memoryview(received) as view:
            self._incoming.write(view[:length])
        del received[:length]
        self._record_is_new = True
        return True

    async def _fill(self) -> None:
        # No deadline: the caller decides how long to wait.
        self.take_received(await self.transport_stream.receive_some(_RECEIVE_SIZE))

    def take_received(self, data: Bytes) -> None:
        """Take what came from the connection; empty at EOF."""
        if data:
            self._received.extend(data)
        else:
            self._incoming.write(self._received)
            self._received.clear()
            self._incoming.write_eof()

    async def _flush(self) -> None:
        async with self._to_wire:
            await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        while data := self.take_outgoing():
            await self.transport_stream.send_all(data)

    def take_outgoing(self) -> Bytes:
        """Take what is to be sent next; empty if there is nothing."""
        rest, self._rest = self._rest, b""
        if rest:
            return rest
        self._replies = 0
        return self._outgoing.read()

    async def _reply(self) -> None:
        """Send OpenSSL's replies to what was read. If the connection takes nothing now, they are sent later.

        Raises:
            trio.BrokenResourceError: more than 64 KiB of them wait.
        """
        if not self.owes_reply or self._to_wire.locked():
            return  # the task that holds the lock sends these, too
        async with self._to_wire:
            with trio.move_on_after(_REPLY_TIMEOUT) as waiting:
                await self.transport_stream.wait_send_all_might_not_block()
            if waiting.cancelled_caught:
                return
            # Shielded: half a record would break the connection, and a read must be cancellable without harm.
            with trio.move_on_after(_REPLY_TIMEOUT, shield=True) as sending:
                await self._send_outgoing()
        if sending.cancelled_caught:
            raise trio.BrokenResourceError("TLS: the other end does not take a reply that it asked for")


async def _in_thread(call: Callable[[], _T]) -> _T:
    """Run a blocking call in one of at most 8 threads. If cancelled, the thread is abandoned."""
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_MOST_THREADS)
        _threads.set(limiter)
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)


@final
class TlsServerStream(DelegatingStream):
    """A server's TLS that closes both directions at once: the exchange is over when the answer is complete.

    Otherwise a visitor that keeps a connection for later, without reading from it, could hold it forever.

    Args:
        stream: the connection, closed with this.
        context: the certificate.

    Attributes:
        certificate_hash: its SHA-256, as `certificate_hash` returns it.
    """

    transport_stream: TlsStream

    def __init__(self, stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
        self.certificate_hash: Final = certificate_hash(context)
        super().__init__(TlsStream(stream, context, server_side=True, https=True))

    async def do_handshake(self) -> None:
        """See `TlsStream.do_handshake`."""
        await self.transport_stream.do_handshake()

    @property
    def can_half_close(self) -> bool:
        return False

    def leg(self) -> Leg | None:
        return self.transport_stream.make_leg(half_close=False)

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:
        return self.transport_stream.watch(on_readable)

    async def send_eof(self) -> None:
        await self.aclose()
