"""The documentation site builds without a warning: every cross reference resolves, every page is reachable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCS
from public_names import MODULES


def test_the_reference_has_a_page_for_every_public_module() -> None:
    assert {page.stem for page in (DOCS / "reference").glob("*.rst")} == {*MODULES, "index"}


@pytest.mark.slow  # CI runs `make docs`
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Everything but writing HTML, which `make docs` does as well.

    A target that is not found is a name without an entry in docs/reference, or a private type in a public signature:
    publish it, or name it in `nitpick_ignore` of docs/conf.py.
    """
    options = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "--builder", "dummy"]
    command = [sys.executable, "-m", "sphinx", *options, "--doctree-dir", str(tmp_path / "doctrees"), str(DOCS)]
    built = subprocess.run([*command, str(tmp_path / "site")], capture_output=True, text=True, check=False, timeout=280)
    assert built.returncode == 0, built.stderr
