"""The public names of a module say that module as their home, wherever they are defined."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import attrs

__all__ = ["publish"]


def publish(namespace: Mapping[str, Any]) -> None:
    """Set `__module__` of the classes and functions in `__all__` to the module whose `namespace` this is.

    Then a traceback names `pioneer_tunnel.RelayConnectError`, and pickles do not depend on where a class is defined.
    A public module calls this at its end, with `globals()`. Names that it imports later are left out.

    `typing.get_type_hints`, and attrs and cattrs with it, look up the names in a class's annotations in the module that
    `__module__` names. So annotations that are strings are resolved here, before it changes.
    """
    found = [namespace[name] for name in namespace["__all__"] if name in namespace]
    published = [value for value in found if isinstance(value, type | FunctionType)]
    for value in published:
        if isinstance(value, type):
            _resolve_annotations(value)
    for value in published:
        value.__module__ = namespace["__name__"]


def _resolve_annotations(cls: type) -> None:
    annotations = vars(cls).get("__annotations__")
    if annotations:
        hints = typing.get_type_hints(cls, include_extras=True)
        cls.__annotations__ = {name: hints[name] for name in annotations}
    if attrs.has(cls):
        attrs.resolve_types(cls)
