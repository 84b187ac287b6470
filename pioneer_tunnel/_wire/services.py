"""The extension `services`: one link carries several services. docs/protocol.md specifies it.

    challenge      {}
    authenticate   {"serves": [NAME, …]}        what the gateway takes visitors of
    welcome        {"addresses": {NAME: URL}, "refused": {NAME: TEXT}}
    later          gateway: {"type": "services", "serves": […]}
                   relay: {"type": "services", "addresses": {…}, "refused": {…}}

`addresses` has every service of the tunnel, the first one first, and `refused` those that the gateway offers in vain.

`FIRST_SERVICE`, the empty name, stands for the first service of the tunnel. A gateway that takes it by this name gets
its streams without a name in their header. In `addresses` it is the only service of a tunnel that names none. There,
`*` stands for the names that the gateway may create.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, final

import attrs

from .._model.errors import RemoteProtocolError
from .._model.services import ANY_SERVICE, FIRST_SERVICE, MOST_SERVICES, is_service_name
from .._model.text import clean_message
from .messages import Message, encode

__all__ = ["SERVICES", "Located", "located", "located_fields", "located_text", "serves", "serves_text"]

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


@final
@attrs.frozen(kw_only=True)
class Located:
    """Where visitors reach the services of a tunnel.

    Attributes:
        addresses: by name, in the order of the relay.
        refused: why the gateway gets no visitors of a service that it offers, by name.
    """

    addresses: Mapping[str, str] = attrs.field(factory=dict)
    refused: Mapping[str, str] = attrs.field(factory=dict)


def located(message: Message) -> Located:
    """Read what a relay says of services, made printable.

    Raises:
        RemoteProtocolError: a field is not an object of names and texts, or has too many of them.
    """
    return Located(addresses=_texts(message, "addresses"), refused=_texts(message, "refused"))


def _texts(message: Message, name: str) -> dict[str, str]:
    found = message.fields.get(name, {})
    if (
        not isinstance(found, dict)
        or len(found) > 2 * MOST_SERVICES  # those of the entry, and those below its wildcard
        or not all((key == ANY_SERVICE or _is_name(key)) and isinstance(text, str) for key, text in found.items())
    ):
        raise RemoteProtocolError(f"{name!r} is not an object of at most {2 * MOST_SERVICES} names and texts")
    return {key: clean_message(text) for key, text in found.items()}


def located_fields(found: Located) -> dict[str, Mapping[str, str]]:
    """The fields of a relay's message that say where visitors reach the services."""
    fields = {"addresses": found.addresses}
    return fields | {"refused": found.refused} if found.refused else fields


def located_text(found: Located) -> str:
    """The text with which a relay says where visitors reach the services from now on."""
    return encode({"type": SERVICES} | located_fields(found))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and (name == FIRST_SERVICE or is_service_name(name))
