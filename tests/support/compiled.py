"""For tests that a compiled data path cannot run; see docs/compiled.md."""

from __future__ import annotations

from typing import Final

import pytest

from pioneer_tunnel._compiled import COMPILED

__all__ = ["in_python"]

in_python: Final = pytest.mark.skipif(COMPILED, reason="Python can neither inherit from a compiled class nor patch it")
