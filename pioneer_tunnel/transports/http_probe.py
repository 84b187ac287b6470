"""Does a site answer? One HTTP request, of which no more is read than the status.

Neighbour: the `process` transport asks so whether its program's tunnel is up.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from typing import Final

import trio

from .._version import __version__
from ..address import RelayAddress
from ..dialer import Dialer, dial_relay
from ..errors import RelayConnectError, RelayResolveError
from ..process_config import ProbeUrl
from ..redial import Redial

__all__ = ["ask_for_status"]

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
_STATUS_LINE_LIMIT: Final = 1024


async def ask_for_status(
    url: ProbeUrl,
    *,
    dial: Dialer,
    make_tls: Callable[[], ssl.SSLContext],
    timeout: float,
    redial: Redial | None = None,
) -> int | str:
    """The HTTP status that `url` answers with, or in words why there is none.

    Args:
        timeout: seconds for each of connecting, TLS, and the answer.
        redial: what earlier probes and attempts have learnt.

    Raises:
        InvalidSettingsError: a file for TLS cannot be used.
    """
    redial = redial or Redial()
    address = RelayAddress(None, url.site.host, url.site.port)
    try:
        tls = await redial.tls(make_tls, address, timeout=timeout) if url.site.scheme == "https" else None
        stream, _ = await dial_relay(address, dial=redial.dialer(dial, timeout=timeout), tls=tls, timeout=timeout)
    except (RelayConnectError, RelayResolveError) as error:
        return str(error).replace("the relay's name", "the name").replace("the relay at ", "")
    request = (
        f"GET {url.path} HTTP/1.1\r\nHost: {url.authority}\r\nUser-Agent: pioneer-tunnel/{__version__}\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n"
    )
    received = b""
    try:
        with trio.fail_after(timeout):
            await stream.send_all(request.encode("ascii"))
            while b"\n" not in received and len(received) < _STATUS_LINE_LIMIT:
                data = await stream.receive_some(_STATUS_LINE_LIMIT)
                if not data:
                    return f"{url} closed the connection without an answer"
                received += data
    except trio.TooSlowError:
        return f"{url} did not answer within {timeout:g} seconds"
    except (trio.BrokenResourceError, ssl.SSLError):
        return f"{url} broke the connection"
    finally:
        await trio.aclose_forcefully(stream)
    match = _STATUS_LINE.match(received)
    return f"{url} does not answer as HTTP" if match is None else int(match[1])
