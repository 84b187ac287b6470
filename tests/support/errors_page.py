"""docs/errors.md, every error kind: `python tests/support/errors_page.py > docs/errors.md` writes it anew."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Final

from pioneer_tunnel import ErrorKind, TunnelError
from pioneer_tunnel._model.explanations import causes_of, classes_of

__all__ = ["errors_page"]

_INTRODUCTION: Final = """# Every error kind

When a tunnel is not up, its status has an `error_kind`: what went wrong, for a program. The `message` says it for a
person, with the address, file or key. In Python the same failure is a `TunnelError`, whose `kind` is the error kind.

*Final* means that no further attempt is made until something changes: `apply` with a change, switching off and on, or
a restart of `open_tunnel`. Everything else is retried, after 1, 2, 4 … 30 seconds, each ± 20 % (`RestartPolicy`).
[troubleshooting.md](troubleshooting.md) begins with what you see instead.

This page is made from the docstrings of the exceptions, by `python tests/support/errors_page.py > docs/errors.md`.
"""

_RETRIED: Final = "`failed` before the first connect, `reconnecting` after it. Retried."
_FINAL: Final = "`failed`. Final."
_REJECTED: Final = (
    "`failed`. Final if the tunnel was never up with this key at this relay; else retried every 15 minutes, since a"
    " relay's registry can be wrong for a moment."
)
_SHOWN: Final = {
    ErrorKind.INVALID_SETTINGS: (
        "`failed`. Final. Where the relay does not know the service or the name, and the tunnel was up with this key"
        " before, it is retried every 15 minutes."
    ),
    ErrorKind.LOCAL_GATEWAY_UNAVAILABLE: (
        "`connected`: dialled as the tunnel comes up, and after three visitors in a row got no answer; then every 5"
        " seconds until the server answers."
    ),
}


def errors_page() -> str:
    """The text of the page."""
    return _INTRODUCTION + "".join(_section(kind) for kind in ErrorKind)


def _section(kind: ErrorKind) -> str:
    classes = classes_of(kind)
    parts = [f"\n## `{kind}`\n"]
    for cls in classes:
        summary, *rest = (inspect.getdoc(cls) or "").split("\n\n")
        explained = [" ".join(text.split()) for text in rest if not text.startswith("- ")]
        parts.append(f"\n`{cls.__name__}`: {' '.join([_one_line(summary), *explained])}\n")
        if cls is classes[0]:
            parts.append(f"\nStatus: {_shown(cls)}\n")
        parts.append("\n| cause | what to do |\n|---|---|\n")
        parts += [f"| {cause.text} | {_linked(cause.cure)} |\n" for cause in causes_of(cls)]
    return "".join(parts)


def _linked(cure: str) -> str:
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", cure)


def _shown(cls: type[TunnelError]) -> str:
    if cls.kind in _SHOWN:
        return _SHOWN[cls.kind]
    if cls.rejection:
        return _REJECTED
    return _FINAL if cls.final else _RETRIED


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(errors_page())
