"""How a public name goes: it warns for at least one minor release before it is removed."""

from __future__ import annotations

import warnings

__all__ = ["PioneerTunnelDeprecationWarning", "warn_deprecated"]


class PioneerTunnelDeprecationWarning(FutureWarning):
    """A public name is used that a later version removes.

    A `FutureWarning`, which Python shows by default: a `DeprecationWarning` would reach tests alone.
    """


def warn_deprecated(name: str, *, since: str, instead: str) -> None:
    """Warn the caller of the caller that `name` will be removed.

    Args:
        name: the public name.
        since: the version that deprecated it.
        instead: what to use.
    """
    warnings.warn(
        f"{name} is deprecated since pioneer-tunnel {since}; use {instead}",
        PioneerTunnelDeprecationWarning,
        stacklevel=3,
    )
