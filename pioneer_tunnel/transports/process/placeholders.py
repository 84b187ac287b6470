"""Texts with `{placeholders}`, as an operator writes them for a tunnel program.

    Template.parse("{local_host}:{local_port}", known=("local_host", "local_port"))

A literal brace is doubled, `{{`. Nothing else is special: there are no formats, attributes or conversions, so a value
cannot do more than fill its place. Mistakes are reported when the text is read, never when it is filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, final

import attrs

from ..._model.text import hide_secrets
from ..._storage.validation import nearest

__all__ = ["Template"]

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@final
@attrs.frozen
class Template:
    """A text with placeholders.

    Attributes:
        text: the text as written.
        parts: its parts, in order: literal texts at even indices, names of placeholders at odd ones.
    """

    text: str
    parts: tuple[str, ...] = attrs.field(repr=False, eq=False)

    @classmethod
    def parse(cls, text: str, known: Iterable[str], refused: Mapping[str, str] | None = None) -> Template:
        """Read a text.

        Args:
            text: the text.
            known: the placeholders that it may hold.
            refused: placeholders that exist but are not allowed here, and the reason.

        Raises:
            ValueError: it holds another placeholder, or a single brace.
        """
        names = tuple(known)
        parts = [""]
        end = 0
        for token in _TOKEN.finditer(text):
            parts[-1] += text[end : token.start()]
            end = token.end()
            name = token[1]
            if name in names:
                parts += [name, ""]
            elif name is not None and refused is not None and name in refused:
                raise ValueError(refused[name])
            elif name is not None:
                raise ValueError(_unknown(name, names))
            elif token[0] in ("{{", "}}"):
                parts[-1] += token[0][0]
            else:
                raise ValueError(
                    f"holds a lone {token[0]!r}; a brace that is meant as one is doubled, {token[0] * 2!r}"
                )
        parts[-1] += text[end:]
        return cls(text, tuple(parts))

    @property
    def placeholders(self) -> frozenset[str]:
        """The names of its placeholders."""
        return frozenset(self.parts[1::2])

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with the values in place. Placeholders in a value are not filled in."""
        return "".join(values[part] if index % 2 else part for index, part in enumerate(self.parts))


def _unknown(name: str, known: tuple[str, ...]) -> str:
    if not _NAME.fullmatch(name):
        # Text in braces, as in JSON, may be anything, such as a password, so it is not quoted.
        return "holds braces around what is no placeholder; a brace that is meant as one is doubled, '{{' and '}}'"
    return (
        f"holds the unknown placeholder '{{{hide_secrets(name)}}}'; the nearest known one is"
        f" '{{{nearest(name, known)}}}'; a brace that is meant as one is doubled, '{{{{'"
    )
