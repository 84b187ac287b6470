"""docs/names.md, the list of all public names: `python tests/support/names_page.py > docs/names.md` writes it anew."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
from types import ModuleType
from typing import Any, Final

__all__ = ["names_page"]

MODULES: Final = (
    "pioneer_tunnel",
    "pioneer_tunnel.asgi",
    "pioneer_tunnel.aio",
    "pioneer_tunnel.blocking",
    "pioneer_tunnel.relay",
    "pioneer_tunnel.testing",
    "pioneer_tunnel.testing.strategies",
)

_INTRODUCTION: Final = """# All public names

What is not here is private, and may change at any time. `help(name)` tells more: arguments, units, defaults, errors.
This page is made from the docstrings, by `python tests/support/names_page.py > docs/names.md`.
"""


def names_page() -> str:
    """The text of the page."""
    parts = [_INTRODUCTION]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"\n## `{name}`\n\n{_first_line(inspect.getdoc(module) or '')}\n\n| name | |\n|---|---|\n")
        parts += [f"| `{public}` | {_about(module, public)} |\n" for public in sorted(module.__all__, key=str.lower)]
    return "".join(parts)


def _about(module: ModuleType, name: str) -> str:
    value: Any = getattr(module, name)
    if isinstance(value, str):
        return "the version of this package"
    text = inspect.getdoc(value) if inspect.isclass(value) or inspect.isfunction(value) else _text_below(module, name)
    return _first_line(text or "").replace("|", "\\|")


def _text_below(module: ModuleType, name: str) -> str:
    """The string below the assignment of `name`, in the module or where the module takes its names from."""
    sources = [module] + [
        found for found in sys.modules.values() if getattr(found, "__name__", "").startswith("pioneer")
    ]
    for source in sources:
        if getattr(source, name, None) is not getattr(module, name):
            continue
        body = ast.parse(inspect.getsource(source)).body
        for statement, following in itertools.pairwise(body):
            target = getattr(statement, "target", None) or (getattr(statement, "targets", None) or [None])[0]
            if getattr(target, "id", None) == name and isinstance(following, ast.Expr):
                return inspect.cleandoc(ast.literal_eval(following.value))
    raise AssertionError(f"{name} is not explained")


def _first_line(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.stdout.write(names_page())
