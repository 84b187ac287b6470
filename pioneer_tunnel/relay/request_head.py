"""Read the head of a connection's first request, and answer a request that cannot be served."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

from .._http.head import BadRequest, HeadReader, RequestHead, error_response
from .._net.closing import close_after_answer

__all__ = ["HEAD_TIMEOUT", "READ_SIZE", "Refusal", "ended_early", "nothing_came", "read_head", "refuse", "too_slow"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds for a request head."""

READ_SIZE: Final = 16 * 1024


class Refusal(Exception):
    """A request cannot be served.

    Attributes:
        status: of the answer. The exception's text is its body.
        omit_body: True when the request is a HEAD: the answer has no body.
        headers: further headers of the answer.
        reason: for counts, see `RelayStats`.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        omit_body: bool = False,
        headers: Sequence[tuple[str, str]] = (),
        reason: str = "bad_request",
    ) -> None:
        super().__init__(text)
        self.reason: Final = reason
        self.status = status
        self.omit_body = omit_body
        self.headers: Final = headers

    @classmethod
    def of(cls, request: BadRequest) -> Refusal:
        """The refusal of a malformed request."""
        return cls(request.status, request.reason, omit_body=request.omit_body)


async def read_head(stream: trio.abc.Stream) -> tuple[RequestHead | None, bytes]:
    """Read a request head.

    Returns:
        The head, and all bytes that were read: the head and what came with it. (None, b"") when the stream ended
        before its first byte.

    Raises:
        Refusal: the head is malformed, truncated or too slow.
        trio.BrokenResourceError: the connection broke.
    """
    reader = HeadReader()
    with trio.move_on_after(HEAD_TIMEOUT):
        try:
            while data := await stream.receive_some(READ_SIZE):
                head = reader.feed(data)
                if head is not None:
                    return head, reader.received
        except BadRequest as error:
            raise Refusal.of(error) from error
        if not reader.received:
            return None, b""
        raise ended_early(reader)
    raise too_slow(reader)


def ended_early(reader: HeadReader) -> Refusal:
    """The refusal of a request of which the visitor has sent only a part before EOF."""
    return Refusal(400, "the request ended before its head did", omit_body=reader.omit_body)


def too_slow(reader: HeadReader) -> Refusal:
    """The refusal of a request whose head did not come in time."""
    return Refusal(408, f"no whole request head came within {HEAD_TIMEOUT:g} seconds", omit_body=reader.omit_body)


def nothing_came(seconds: float) -> Refusal:
    """The refusal of a connection without a first byte."""
    return Refusal(408, f"nothing came within {seconds:g} seconds")


async def refuse(stream: trio.abc.Stream, refusal: Refusal) -> None:
    """Send the answer of a refusal, and close. Takes at most `HEAD_TIMEOUT` seconds."""
    with trio.move_on_after(HEAD_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(
            error_response(refusal.status, str(refusal), omit_body=refusal.omit_body, headers=refusal.headers)
        )
        await close_after_answer(stream)
