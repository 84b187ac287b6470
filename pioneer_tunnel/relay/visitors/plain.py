"""What the relay answers itself to visitors without TLS: an authority's HTTP-01, and the way to https://."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias
from urllib.parse import quote_from_bytes

import trio

from ..._http.head import RequestHead
from ..._model.addresses import bracketed
from ..._net.closing import close_after_answer
from ..request_head import HEAD_TIMEOUT, Refusal
from ..tunnels import Route

__all__ = ["HttpAnswer", "send_text", "to_https"]

HttpAnswer: TypeAlias = Callable[[str, bytes], bytes | None]
"""The body for a GET of a path at a host; None if it is not ours to answer."""

_IN_A_TARGET: Final = "%/:?#[]@!$&'()*+,;=~"


def to_https(head: RequestHead, route: Route) -> Refusal:
    """The answer that sends a visitor to the same page with TLS."""
    url = route.url
    place = str(url) if url is not None and url.scheme == "https" else f"https://{bracketed(head.host)}"
    target = quote_from_bytes(head.target, safe=_IN_A_TARGET) if head.target.startswith(b"/") else "/"
    return Refusal(308, "use https://", omit_body=head.omit_body, headers=[("Location", place + target)])


async def send_text(stream: trio.abc.Stream, text: bytes, *, omit_body: bool) -> None:
    """Answer with `text`, and close. Takes at most `HEAD_TIMEOUT` seconds."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
        b"Content-Length: %d\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n" % len(text)
    )
    with trio.move_on_after(HEAD_TIMEOUT):
        await stream.send_all(head if omit_body else head + text)
        await close_after_answer(stream)
