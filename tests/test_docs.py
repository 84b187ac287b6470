"""What the documents say is so: links lead somewhere, quoted messages exist, and every page and name has its place."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
from documents import DOCS, DOCUMENTS, ROOT, anchors_of, blocks, links_of
from errors_page import errors_page

from pioneer_tunnel import ErrorKind, explain
from pioneer_tunnel._model.explanations import causes_of, classes_of

NAMED: Final = re.compile(r"\btest_[a-z0-9_]+\b(?!\.py)")
REFERENCE: Final = sorted((DOCS / "reference").glob("pioneer_tunnel*.rst"))


def test_every_test_that_the_threat_model_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    named = set(NAMED.findall((DOCS / "security.md").read_text()))
    assert len(named) > 30
    assert named <= there


# Pages and links


def test_every_page_is_in_a_toctree() -> None:
    """If not: name the new page in the toctree of docs/index.md where its readers look for it."""
    listed = Counter(
        line.strip()
        for block in blocks(DOCS / "index.md", language="{toctree}")
        for line in block.text.splitlines()
        if line and not line.startswith(":")
    )
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"} | {"reference/index"}
    assert listed == Counter(pages)
    in_reference = re.findall(r"^   (pioneer_tunnel\S*)$", (DOCS / "reference" / "index.rst").read_text(), re.MULTILINE)
    assert Counter(in_reference) == Counter(page.stem for page in REFERENCE)


def test_every_example_is_on_the_page_of_examples() -> None:
    shown = {block.language.partition("../")[2] for block in blocks(DOCS / "examples.md")}
    deployed = [path for path in (ROOT / "examples" / "deploy").rglob("*.*") if path.suffix != ".json"]
    deployed += [ROOT / "examples" / "deploy" / name for name in ("Caddyfile", "Containerfile")]
    files = [*(ROOT / "examples").rglob("*.py"), *deployed]
    assert shown == {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_inside_the_repository_leads_somewhere(document: Path) -> None:
    for link in links_of(document):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link


# Names


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_the_reference_has_every_public_name_once(page: Path) -> None:
    """If not: add `.. autoclass:: NAME`, `autofunction`, `autoexception` or `autodata` where it belongs."""
    documented = re.findall(r"^\.\. auto(?:class|function|exception|data):: (\w+)$", page.read_text(), re.MULTILINE)
    assert Counter(documented) == Counter(importlib.import_module(page.stem).__all__)


# Errors and messages


def test_the_page_of_errors_is_up_to_date() -> None:
    """If not: `python tests/support/errors_page.py > docs/errors.md`."""
    assert (DOCS / "errors.md").read_text() == errors_page()


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_error_kind_has_causes_with_cures(kind: ErrorKind) -> None:
    assert classes_of(kind)
    for cls in classes_of(kind):
        assert causes_of(cls), cls
        for cause in causes_of(cls):
            assert cause.text, cls
            assert cause.cure.endswith("."), (cls, cause)
    explanation = explain(kind)
    assert explanation.summary.endswith(".")
    assert all(cls.final == explanation.final for cls in classes_of(kind))
    assert [*explanation.causes] == [cause for cls in classes_of(kind) for cause in causes_of(cls)]


def test_the_messages_that_the_troubleshooting_quotes_are_said() -> None:
    """A message stands in the first column, and has a space; `…` stands for what differs."""
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]* [^`]*)`", row)]
    assert len(quoted) > 25
    said = texts_of_the_package()
    system = ["Connection refused", "Address already in use", "Permission denied", "Too many open files"]
    for message in quoted:
        for part in re.split(r"…|: (?=[A-Z])", message):
            assert part.strip() in system or any(part.strip() in text for text in said), message


def texts_of_the_package() -> list[str]:
    """All texts in the source; the places of values in them are empty."""
    texts = []
    for path in (ROOT / "pioneer_tunnel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
