"""Checks visitors and their requests against the rules of a service.

A request is answered here, or let through, before a byte of it reaches the local server. On a kept connection each
request is checked. `allows_now` does so without waiting, for a request whose password was computed a short time ago.
Where it says False, the request has to wait for `check`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._http.head import RequestHead, error_response
from .._model.text import clean_message, cut
from .._storage.networks import is_within
from .attempts import Attempts
from .htpasswd import FILE_LIMIT as HTPASSWD_LIMIT, Htpasswd
from .passwords import Passwords
from .requests import AUTHORIZATION, Password, bearer_token, is_exempt, password
from .rules import Access
from .secret_file import SecretFile
from .tokens import FILE_LIMIT as TOKENS_LIMIT, Tokens
from .workers import Busy, Workers

__all__ = ["Denial", "Guard", "check_files", "guard_of"]

_USER_SHOWN: Final = 64
_log: Final = logging.getLogger("pioneer_tunnel.access")


@final
@attrs.frozen
class Denial:
    """The answer to a request that is not let through.

    Attributes:
        status: of the answer.
        text: its body.
        headers: further headers.
    """

    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()

    def response(self, *, omit_body: bool) -> bytes:
        """The bytes of the answer, after which the connection is closed."""
        return error_response(self.status, self.text, omit_body=omit_body, headers=self.headers)


_FORBIDDEN: Final = Denial(403, "visitors from this address are not admitted here")
_AMBIGUOUS: Final = Denial(400, "the request has more than one Authorization header")
_NO_RULES: Final = Denial(503, "the access rules of this service cannot be checked at the moment")
_BUSY: Final = Denial(503, "too many passwords are being checked at the moment", (("Retry-After", "2"),))


@final
class Guard:
    """Checks the visitors of one service.

    Args:
        access: the rules.
        workers: compute the hashes of passwords.
    """

    def __init__(self, access: Access, workers: Workers) -> None:
        self.access: Final = access
        self._workers: Final = workers
        self._attempts: Final = Attempts()
        self._users = None if access.basic_auth is None else _users_file(access.basic_auth)
        self._tokens = None if access.bearer_tokens is None else _tokens_file(access.bearer_tokens)
        self._passwords: Passwords | None = None

    @property
    def removes(self) -> frozenset[bytes]:
        """Names of headers that are for this guard, and that the local server must not get."""
        return frozenset({AUTHORIZATION}) if self.access.needs_http else frozenset()

    def admits(self, visitor: str | None) -> bool:
        """Whether visitors from the IP address `visitor` are admitted; None for one whose address is not known."""
        access = self.access
        if not access.names_networks:
            return True
        if visitor is None or (access.deny is not None and is_within(visitor, access.deny)):
            return False
        return access.allow is None or is_within(visitor, access.allow)

    def allows_now(self, head: RequestHead, visitor: str | None, source: str | None) -> bool:
        """Whether a request is let through, as far as that is known already. Its arguments are those of `check`."""
        found = self._before_credentials(head, visitor, source)
        if not isinstance(found, bytes):
            return found is None
        now = trio.current_time()
        if self._tokens is not None:
            tokens = self._tokens.value if self._tokens.is_fresh(now) else None
            token = bearer_token(found)
            return tokens is not None and token is not None and tokens.holds(token)
        fresh = self._users is not None and self._users.is_fresh(now)
        passwords, named = self._current_passwords() if fresh else None, password(found)
        return passwords is not None and named is not None and passwords.known(named) is True

    async def check(self, head: RequestHead, visitor: str | None, source: str | None) -> Denial | None:
        """Check a request.

        Args:
            head: of the request.
            visitor: the visitor's IP address; None where it is not known.
            source: what wrong attempts are counted for; None for no limit.

        Returns:
            None to let the request through; otherwise the answer.
        """
        found = self._before_credentials(head, visitor, source)
        if not isinstance(found, bytes):
            return found
        if self._tokens is not None:
            await self._tokens.check()
            return self._check_token(self._tokens.value, bearer_token(found), source)
        assert self._users is not None
        await self._users.check()
        return await self._check_password(self._current_passwords(), password(found), source)

    def _before_credentials(self, head: RequestHead, visitor: str | None, source: str | None) -> Denial | bytes | None:
        """The first steps of `check`, which never wait.

        Returns:
            The Authorization header, if its password or token decides. Otherwise as `check`.
        """
        if not self.admits(visitor):
            return _FORBIDDEN
        if not self.access.needs_http:
            return None
        given = head.values(AUTHORIZATION)
        if len(given) > 1:
            return _AMBIGUOUS
        if is_exempt(self.access, head):
            return None
        if not given:
            return self._unauthorized()
        if wait := self._wait(source, trio.current_time()):
            return _too_many(wait)
        return given[0]

    def _check_token(self, tokens: Tokens | None, token: bytes | None, source: str | None) -> Denial | None:
        if tokens is None:
            return _NO_RULES
        if token is None:
            return self._unauthorized()
        if tokens.holds(token):
            return None
        if source is not None:
            self._attempts.take(source, trio.current_time())
        return self._unauthorized(', error="invalid_token"')

    async def _check_password(
        self, passwords: Passwords | None, given: Password | None, source: str | None
    ) -> Denial | None:
        if passwords is None:
            return _NO_RULES
        if given is None:
            return self._unauthorized()
        while (right := passwords.known(given)) is None:
            if await passwords.computed_by_another(given):
                continue
            # Taken before, since many attempts may be computed at a time.
            if wait := self._wait(source, trio.current_time()):
                return _too_many(wait)
            if source is not None:
                self._attempts.take(source, trio.current_time())
            try:
                right = await passwords.compute(given)
            except Busy:
                right = None
            if source is not None and right is not False:
                self._attempts.give_back(source, trio.current_time())
            if right is None:
                return _BUSY
        if right:
            return None
        _log.debug(
            "a password of user %r is wrong", cut(clean_message(given.user.decode("utf-8", "replace")), _USER_SHOWN)
        )
        return self._unauthorized()

    def _current_passwords(self) -> Passwords | None:
        users = None if self._users is None else self._users.value
        if users is None:
            return None
        if self._passwords is None or self._passwords.users is not users:
            self._passwords = Passwords(users, self._workers)
        return self._passwords

    def _wait(self, source: str | None, now: float) -> float:
        return 0.0 if source is None else self._attempts.wait(source, now)

    def _unauthorized(self, why: str = "") -> Denial:
        realm = self.access.realm.replace("\\", "\\\\").replace('"', '\\"')
        if self._tokens is not None:
            return Denial(401, "a bearer token is needed here", (("WWW-Authenticate", f'Bearer realm="{realm}"{why}'),))
        challenge = f'Basic realm="{realm}", charset="UTF-8"'
        return Denial(401, "a user and a password are needed here", (("WWW-Authenticate", challenge),))


def _too_many(wait: float) -> Denial:
    return Denial(429, "there were too many wrong attempts from this address", (("Retry-After", str(math.ceil(wait))),))


def _users_file(path: Path) -> SecretFile[Htpasswd]:
    return SecretFile(path, Htpasswd.parse, limit=HTPASSWD_LIMIT)


def _tokens_file(path: Path) -> SecretFile[Tokens]:
    return SecretFile(path, Tokens.parse, limit=TOKENS_LIMIT)


def check_files(access: Access) -> None:
    """Read the files that `access` names, to find out what is wrong with them. Blocks.

    Raises:
        StorageError: a file cannot be read, or others may access it.
        InvalidSettingsError: the content of a file cannot be used, or the extra `access` is not installed.
    """
    if access.basic_auth is not None:
        _users_file(access.basic_auth).load()
    if access.bearer_tokens is not None:
        _tokens_file(access.bearer_tokens).load()


@final
class _Shared:
    """What all guards of a run of Trio share, and the guards themselves: they keep counting after a reload."""

    def __init__(self) -> None:
        self.workers: Final = Workers()
        self.guards: Final[dict[Access, Guard]] = {}


_shared: Final = trio.lowlevel.RunVar[_Shared]("pioneer_tunnel.access")


def guard_of(access: Access) -> Guard:
    """The guard for these rules. It is the same each time, so that it knows of earlier attempts."""
    try:
        shared = _shared.get()
    except LookupError:
        shared = _Shared()
        _shared.set(shared)
    if access not in shared.guards:
        shared.guards[access] = Guard(access, shared.workers)
    return shared.guards[access]
