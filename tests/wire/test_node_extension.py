"""The extension `node`: the welcome names the node that has the session."""

from __future__ import annotations

import pytest

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._wire.messages import Message
from pioneer_tunnel._wire.node import NODE, node_told


def test_it_is_told_in_the_welcome() -> None:
    assert node_told({NODE: Message(NODE, {"name": "fra1/0", "later": 1})}) == "fra1/0"
    assert node_told({}) is None


@pytest.mark.parametrize("name", [None, 7, "", "fra 1", "fra1\r\nX: y", "a" * 129])
def test_a_name_that_would_not_fit_into_a_header_is_refused(name: object) -> None:
    with pytest.raises(RemoteProtocolError, match="'name'"):
        node_told({NODE: Message(NODE, {"name": name})})
