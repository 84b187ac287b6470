"""The status of one certificate that this program orders and renews."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import attrs

from .text import clean_message

__all__ = ["CertificateStatus"]


def _message(text: str | None) -> str | None:
    return None if text is None else clean_message(text) or None


@final
@attrs.frozen(kw_only=True)
class CertificateStatus:
    """The status of the certificate of one name.

    Attributes:
        not_after_unix: wall time when the certificate in use expires, in seconds; None while there is none.
        renew_at_unix: wall time when it is to be renewed; None while there is none.
        message: why the last order failed, and what to do; None if it succeeded, or if there was none.
        retry_at_unix: wall time of the next order after a failure; None unless one is planned.
    """

    not_after_unix: int | None = None
    renew_at_unix: int | None = None
    message: str | None = attrs.field(default=None, converter=_message)
    retry_at_unix: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """As an object of JSON; a field that is None is absent."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    @classmethod
    def from_wire(cls, wire: Any) -> CertificateStatus:
        """Read an object of JSON. Unknown keys are ignored.

        Raises:
            TypeError: it is no object, or a field has another type.
        """
        if not isinstance(wire, Mapping):
            raise TypeError("it is not an object")
        fields = {name: wire[name] for name in _TYPES if wire.get(name) is not None}
        if any(type(value) is not _TYPES[name] for name, value in fields.items()):
            raise TypeError("a field of it has another type")
        return cls(**fields)


_TYPES: Final[Mapping[str, type]] = {
    "not_after_unix": int,
    "renew_at_unix": int,
    "message": str,
    "retry_at_unix": int,
}
