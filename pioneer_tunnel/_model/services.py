"""The names of the services that a tunnel carries."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["ANY_SERVICE", "FIRST_SERVICE", "MOST_SERVICES", "SERVICE_NAMES", "is_service_name"]

FIRST_SERVICE: Final = ""
"""The key for the first service of a tunnel, whatever the relay calls it."""

ANY_SERVICE: Final = "*"
"""The name, at the relay, of the services that gateways create below a wildcard."""

MOST_SERVICES: Final = 64
"""Services that one tunnel may have. Their names and addresses fit one text message of the protocol."""

SERVICE_NAMES: Final = "1 to 63 lower-case letters, digits, '-', '_' and '.', with a letter or digit at both ends"
"""What a name may be, for errors."""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9_.-]{0,61}[a-z0-9])?")


def is_service_name(text: str) -> bool:
    """True for a name, see `SERVICE_NAMES`."""
    return _NAME.fullmatch(text) is not None
