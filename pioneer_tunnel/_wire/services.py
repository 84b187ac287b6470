"""The extension `services`: one link carries several services. docs/protocol.md specifies it.

    challenge      {}
    authenticate   {"serves": [NAME, …]}        what the gateway takes visitors of
    welcome        {"addresses": {NAME: URL}}   every service of the tunnel, the first one first
    later          gateway: {"type": "services", "serves": […]}    relay: {"type": "services", "addresses": {…}}

`FIRST_SERVICE`, the empty name, stands for the first service of the tunnel. A gateway that takes it by this name gets
its streams without a name in their header. In `addresses` it is the only service of a tunnel that names none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from .._model.errors import RemoteProtocolError
from .._model.services import FIRST_SERVICE, MOST_SERVICES, is_service_name
from .._model.text import clean_message
from .messages import Message, encode

__all__ = ["SERVICES", "addresses", "addresses_text", "serves", "serves_text"]

SERVICES: Final = "services"
"""The name of the extension, and the type of its texts."""


def serves(message: Message) -> frozenset[str]:
    """The services that a gateway takes visitors of.

    Raises:
        RemoteProtocolError: the field is not a list of at most 64 names.
    """
    names = message.fields.get("serves")
    if not isinstance(names, list) or len(names) > MOST_SERVICES or not all(map(_is_name, names)):
        raise RemoteProtocolError(f"'serves' is not a list of at most {MOST_SERVICES} names of services")
    return frozenset(names)


def serves_text(names: Iterable[str]) -> str:
    """The text with which a gateway says that it takes visitors of `names` from now on."""
    return encode({"type": SERVICES, "serves": sorted(names)})


def addresses(message: Message) -> dict[str, str]:
    """Where visitors reach each service, in the order of the relay, made printable.

    Raises:
        RemoteProtocolError: the field is not an object of at most 64 names and texts.
    """
    found = message.fields.get("addresses")
    if (
        not isinstance(found, dict)
        or len(found) > MOST_SERVICES
        or not all(_is_name(name) and isinstance(address, str) for name, address in found.items())
    ):
        raise RemoteProtocolError(f"'addresses' is not an object of at most {MOST_SERVICES} names and addresses")
    return {name: clean_message(address) for name, address in found.items()}


def addresses_text(found: Mapping[str, str]) -> str:
    """The text with which a relay says that these are the services and their addresses from now on."""
    return encode({"type": SERVICES, "addresses": found})


def _is_name(name: object) -> bool:
    return isinstance(name, str) and (name == FIRST_SERVICE or is_service_name(name))
