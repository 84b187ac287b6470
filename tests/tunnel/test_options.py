"""Every face of `open_tunnel` takes the options of Trio's."""

from __future__ import annotations

import inspect
import typing

from pioneer_tunnel.tunnel.options import TunnelOptions
from pioneer_tunnel.tunnel.tunnel import open_tunnel


def test_the_options_are_those_of_open_tunnel() -> None:
    """But not those that each face has itself."""
    parameters = inspect.signature(open_tunnel, eval_str=True).parameters
    options = {name: parameter.annotation for name, parameter in parameters.items()}
    for own in ("relay", "key", "local", "proxy_protocol"):
        del options[own]
    assert typing.get_type_hints(TunnelOptions) == options
    assert not TunnelOptions.__required_keys__
