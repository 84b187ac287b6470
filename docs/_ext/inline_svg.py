"""Our SVG pictures become part of the page, so that they follow its theme. An image would follow the browser's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.typing import ExtensionMetadata

__all__ = ["setup"]

_FOLDER: Final = "pictures/"


class InlinePictures(SphinxPostTransform):
    default_priority = 200
    formats = ("html", "dirhtml")

    def run(self, **options: object) -> None:
        for image in [*self.document.findall(nodes.image)]:
            uri: str = image["uri"]
            if uri.startswith(_FOLDER) and uri.endswith(".svg"):
                svg = (Path(self.app.srcdir) / uri).read_text()
                image.replace_self(nodes.raw("", f'<div class="scrolled">{svg}</div>', format="html"))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_post_transform(InlinePictures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
