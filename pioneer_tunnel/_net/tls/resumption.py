"""TLS sessions that the next connection to the same server resumes.

A resumed handshake needs no certificate on its way and no signature, so it costs both ends and the path less. The
certificate was checked when the session began, by the same context; the server decides how long a session lasts, and
OpenSSL's default is two hours.

In TLS 1.3 a server sends what is needed with its first data. So the session is read when the next connection is made,
and the last one is kept until then, also if it is closed: OpenSSL forgets the session of a connection that is freed
without a goodbye.
"""

from __future__ import annotations

import ssl
from typing import final

from .stream import TlsStream

__all__ = ["Resumption"]


@final
class Resumption:
    """The session of the last connection to a server, for one that connects again and again."""

    def __init__(self) -> None:
        self._last: tuple[ssl.SSLContext, str, TlsStream] | None = None
        self._session: ssl.SSLSession | None = None

    def session(self, context: ssl.SSLContext, host: str) -> ssl.SSLSession | None:
        """The session for the next connection; None if there is none of the same context and name."""
        if self._last is None:
            return None
        its_context, its_host, stream = self._last
        if its_context is not context or its_host != host:
            return None
        if not stream.session_reused:  # otherwise the older one still serves, and each read costs memory
            self._session = stream.session
        return self._session

    def note(self, context: ssl.SSLContext, host: str, stream: TlsStream) -> None:
        """Note a connection whose handshake has succeeded."""
        self._last = context, host, stream
