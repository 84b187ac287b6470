"""The interface of an ACME authority (RFC 8555): what an order takes, and what can go wrong. `client` implements it."""

from __future__ import annotations

import enum
from typing import Final, Protocol, final

import attrs

from .._model.text import clean_message

__all__ = ["CHALLENGE_PATH", "Authority", "Challenge", "ChallengeKind", "Order", "OrderFailed", "Scope"]

CHALLENGE_PATH: Final = b"/.well-known/acme-challenge/"
"""Where an authority asks by HTTP-01."""


@final
class ChallengeKind(enum.StrEnum):
    """How the authority checks that a name leads to us."""

    HTTP_01 = "http-01"
    TLS_ALPN_01 = "tls-alpn-01"


@final
class Scope(enum.Enum):
    """Whom a failed order concerns."""

    NAME = enum.auto()
    RATE_LIMIT = enum.auto()
    """The name, and others a little."""
    AUTHORITY = enum.auto()
    """Every name."""


@final
class OrderFailed(Exception):
    """An order has failed. The text says why, and what to do.

    Attributes:
        scope: whom it concerns.
        retry_after: seconds that the authority wants; None if it says nothing.
    """

    def __init__(self, text: str, *, scope: Scope, retry_after: float | None = None) -> None:
        super().__init__(clean_message(text))  # the authority may have said it
        self.scope: Final = scope
        self.retry_after: Final = retry_after


@final
@attrs.frozen
class Challenge:
    """What the authority wants to see at a name.

    Attributes:
        name: the name.
        kind: how it looks.
        token: the last part of the path that it asks for by HTTP.
        key_authorization: what proves that the account is ours. It is no secret.
    """

    name: str
    kind: ChallengeKind
    token: str
    key_authorization: str


class Order(Protocol):
    """An order for one name. Its methods block."""

    @property
    def challenges(self) -> tuple[Challenge, ...]:
        """What the authority wants to see. Empty if it has seen that lately."""

    def begin_validation(self) -> None:
        """The challenges can be seen from now on.

        Raises:
            OrderFailed: see the class.
        """

    def is_validated(self) -> bool:
        """Whether the authority has seen them; False if it has not decided yet.

        Raises:
            OrderFailed: it has not seen them, or has seen something else.
        """

    def certificate(self) -> bytes | None:
        """The certificate and its chain, PEM; None if the authority has not made it yet.

        Raises:
            OrderFailed: see the class.
        """


class Authority(Protocol):
    """An authority, and our account there. Its methods block."""

    def order(self, name: str, csr: bytes, *, kind: ChallengeKind, replaces: bytes | None) -> Order:
        """Place an order.

        Args:
            name: the name.
            csr: the request, PEM.
            kind: how the authority is to check it.
            replaces: the certificate in use, PEM; None if there is none.

        Raises:
            OrderFailed: see the class.
        """

    def suggestion(self, certificate: bytes) -> tuple[float | None, float]:
        """When the authority wants this certificate to be renewed, in seconds since 1970; None if it does not say.

        And the seconds after which to ask again.

        Raises:
            OrderFailed: see the class.
        """
