"""Which requests of browsers are let in: Host, Origin, sessions, and guesses of the token. No I/O.

A browser sends what other sites tell it to send, with the user's cookies. So each request passes these checks:

- Host: one of the names of this gateway. A site that lets its own name resolve to 127.0.0.1 (DNS rebinding) sends its
  own name.
- Origin: that of this gateway, where there is one. A form, a script or a WebSocket of another site has another one, or
  `null`.
- Session: a cookie, and a second secret that only pages of this origin know. Browsers send cookies to other ports of
  the same host too. So the cookie alone opens nothing, and neither does a cookie that another program has seen.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import attrs
import h11
import trio

SESSION_SECONDS: Final = 12 * 3600
SESSION_LIMIT: Final = 32
GUESSES: Final = 5
SECONDS_PER_GUESS: Final = 10.0
REMEMBERED_ADDRESSES: Final = 4096
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


class Refused(Exception):
    """A request gets this answer and no other."""

    def __init__(self, status: HTTPStatus, why: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(why)
        self.status = status
        self.headers = [*headers]


@attrs.frozen
class Door:
    """Where a connection came in.

    Attributes:
        scheme: `http` or `https`, as the browser sees it.
        hosts: the gateway's names there, `host` or `host:port`, as `host_of` returns them.
        client: the address whose wrong tokens are counted.
    """

    scheme: str
    hosts: frozenset[str]
    client: str

    @property
    def cookie(self) -> str:
        """The name of the session's cookie. Browsers take the prefix only over TLS, from this very host."""
        return "__Host-settings" if self.scheme == "https" else "settings"


def host_of(url: str) -> str:
    """The host of a URL, with the port unless it is the scheme's default."""
    parts = urlsplit(url)
    return parts.netloc.lower().removesuffix(_DEFAULT_PORTS.get(parts.scheme, ""))


def header(request: h11.Request, name: bytes) -> str | None:
    """The value of a header. Two of them are ambiguous, so they count as none."""
    values = [value for given, value in request.headers if given == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def check_host(request: h11.Request, door: Door) -> str:
    """Return the host that the browser believes to speak to."""
    host = (header(request, b"host") or "").lower().removesuffix(_DEFAULT_PORTS[door.scheme])
    if host not in door.hosts:
        raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "this gateway has another name")
    return host


def check_origin(request: h11.Request, door: Door, host: str, *, needed: bool) -> None:
    """Refuse what another site's page sends. Programs that are no browser send no Origin, nor do links to a page."""
    given = [value for name, value in request.headers if name == b"origin"]
    if given != [f"{door.scheme}://{host}".encode()] and (needed or given):
        raise Refused(HTTPStatus.FORBIDDEN, "this comes from another site")


class Guesses:
    """Counts wrong tokens of each address. An IPv6 network of 64 bits counts as one address."""

    def __init__(self) -> None:
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, client: str) -> None:
        """Refuse a client that has guessed too often."""
        wait = self._now_used(_network(client)) + 1 - GUESSES
        if wait > 0:
            seconds = int(wait * SECONDS_PER_GUESS) + 1
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many wrong tokens", [("Retry-After", str(seconds))])

    def count_wrong(self, client: str) -> None:
        """Count a wrong token."""
        client = _network(client)
        used = self._now_used(client) + 1
        self._used.pop(client, None)
        self._used[client] = used, trio.current_time()
        if len(self._used) > REMEMBERED_ADDRESSES:
            self._used.popitem(last=False)

    def _now_used(self, client: str) -> float:
        used, at = self._used.get(client, (0.0, 0.0))
        return max(used - (trio.current_time() - at) / SECONDS_PER_GUESS, 0.0)


def _network(client: str) -> str:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else client


@attrs.define(eq=False)
class Session:
    """A browser that has shown the token.

    Attributes:
        page_secret: what pages of this origin keep, and send beside the cookie.
        until: the time at which it ends.
    """

    page_secret: str
    until: float
    _held: list[trio.CancelScope] = attrs.field(factory=list)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that is cancelled when the session ends."""
        with trio.CancelScope(deadline=self.until) as scope:
            self._held.append(scope)
            try:
                yield
            finally:
                self._held.remove(scope)

    def end(self) -> None:
        """Cancel what holds it."""
        for scope in self._held:
            scope.cancel()


class Sessions:
    """The sessions, by the digest of their cookie. They end with the program, or when there are too many."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def begin(self) -> tuple[str, Session]:
        """Begin a session; returns its cookie too, which is kept nowhere here."""
        cookie = secrets.token_urlsafe(32)
        session = Session(secrets.token_urlsafe(32), trio.current_time() + SESSION_SECONDS)
        self._sessions[_digest(cookie)] = session
        if len(self._sessions) > SESSION_LIMIT:
            self._end(next(iter(self._sessions)))
        return cookie, session

    def find(self, request: h11.Request, door: Door, page_secret: str | None) -> Session | None:
        """The session of a request; None if it has no cookie, or not the secret that belongs to it."""
        session = self._sessions.get(_digest(cookie_of(request, door)))
        if session is None or trio.current_time() >= session.until:
            return None
        return session if hmac.compare_digest(session.page_secret.encode(), (page_secret or "").encode()) else None

    def end(self, request: h11.Request, door: Door) -> None:
        """End the session of a request that `find` has found."""
        self._end(_digest(cookie_of(request, door)))

    def _end(self, digest: str) -> None:
        self._sessions.pop(digest).end()


def cookie_of(request: h11.Request, door: Door) -> str:
    """The cookie of the session; empty if there is none, or more than one."""
    pairs = [part.strip().partition("=") for part in (header(request, b"cookie") or "").split(";")]
    found = [value for name, _, value in pairs if name == door.cookie]
    return found[0] if len(found) == 1 else ""


def set_cookie(door: Door, cookie: str, seconds: int) -> tuple[str, str]:
    """The header that sets the cookie; with 0 seconds it deletes it."""
    secure = "; Secure" if door.scheme == "https" else ""
    return "Set-Cookie", f"{door.cookie}={cookie}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
