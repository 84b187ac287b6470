"""The extension `node`: the relay is one of several, and tells the gateway which one has its session.

    relay    {}
    gateway  {}
    relay    {"name": NODE}

A gateway that dials to resume a session names its node in a header of the WebSocket request, `Pioneer-Node`. Another
node that gets the request passes the connection on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from .._model.errors import RemoteProtocolError
from .messages import Message

__all__ = ["NODE", "NODE_HEADER", "is_node_name", "node_told"]

NODE: Final = "node"
"""Its name."""

NODE_HEADER: Final = "Pioneer-Node"

_NAME: Final = re.compile(r"[A-Za-z0-9._/-]{1,128}")


def is_node_name(text: str) -> bool:
    """Whether a node may have this name. It is safe in a header and in a log."""
    return _NAME.fullmatch(text) is not None


def node_told(confirmed: Mapping[str, Message]) -> str | None:
    """The node that has the session; None if the relay does not say so.

    Args:
        confirmed: the extensions that the relay confirms.

    Raises:
        RemoteProtocolError: what it says is no name of a node.
    """
    if NODE not in confirmed:
        return None
    name = confirmed[NODE].text("name")
    if not is_node_name(name):
        raise RemoteProtocolError("'name' is no name of a node")
    return name
