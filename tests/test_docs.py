"""What the documents claim to be shown by a test is shown by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from names_page import names_page

ROOT: Final = Path(__file__).parent.parent
NAMED: Final = re.compile(r"\btest_[a-z0-9_]+\b(?!\.py)")


def test_every_test_that_the_threat_model_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    named = set(NAMED.findall((ROOT / "docs" / "security.md").read_text()))
    assert len(named) > 30
    assert named <= there


def test_the_list_of_public_names_is_up_to_date() -> None:
    """If not: `python tests/support/names_page.py > docs/names.md`."""
    assert (ROOT / "docs" / "names.md").read_text() == names_page()
