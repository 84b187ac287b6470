"""The probe reads what a site answers as an HTTP client does, however the answer is cut."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

from pioneer_tunnel.transports.process.config import ProbeUrl
from pioneer_tunnel.transports.process.http_probe import ask_for_status


def no_tls() -> ssl.SSLContext:
    raise AssertionError("TLS is for https:// alone")


@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.0 200\r\n\r\nbody", 200),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 503 Away\r\nContent-Length: 0\r\n\r\n", 503),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "http://office.test/health does not answer as HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "http://office.test/health does not answer as HTTP"),
        (b"HTTP/1.1 20", "http://office.test/health closed the connection without an answer"),
    ],
)
async def test_what_a_site_answers(answer: bytes, found: int | str, piece: int) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("office.test", 80)
        return ours

    async def site() -> None:
        request, size = b"", piece if len(answer) < 1000 else 10_000
        while not request.endswith(b"\r\n\r\n"):
            request += await theirs.receive_some()
        assert request.startswith(b"GET /health HTTP/1.1\r\nHost: office.test\r\n")
        try:
            for start in range(0, len(answer), size):
                await theirs.send_all(answer[start : start + size])
            await theirs.aclose()
        except trio.BrokenResourceError:
            pass  # the probe has seen enough

    async with trio.open_nursery() as nursery:
        nursery.start_soon(site)
        url = ProbeUrl.parse("http://office.test/health")
        assert await ask_for_status(url, dial=dial, make_tls=no_tls, timeout=60) == found
