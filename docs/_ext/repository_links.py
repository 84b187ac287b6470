"""Links that are good to read in the repository become good to read on the site.

A link to a file of the repository, such as `../examples/small_gateway.py`, leads to the page that shows it. A link to
a page is called by the title of the page or section, not by the name of its file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

__all__ = ["setup"]

_NAMED_BY_FILE: Final = re.compile(r"\[([\w-]+\.md)\](\(\1(?:#[^)]*)?\))")
_LINK: Final = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")

_PAGES: Final = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "reporting.md"}


def _page_of(path: str) -> str | None:
    """The page of the site, with its anchor, that shows the file or folder at `path`; None when there is none."""
    if path == "examples/hosts":
        return "examples.md#for-web-frameworks"
    if path.startswith("examples/"):
        return f"examples.md#{Path(path).name.replace('.', '')}"  # the anchor of the heading `name.py`
    return _PAGES.get(path)


def _lead_to_pages(app: Sphinx, document: str, content: list[str]) -> None:
    def page(match: re.Match[str]) -> str:
        found = _page_of(match[1])
        return match[0] if found is None else f"]({found if '#' in found else found + (match[2] or '')})"

    content[0] = _LINK.sub(page, _NAMED_BY_FILE.sub(r"[]\2", content[0]))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("source-read", _lead_to_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
