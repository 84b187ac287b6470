"""No module that mypyc compiles compares with None what mypy believes to know.

mypy does not see that a call sets an attribute that was compared before, and mypyc believes it: when the attribute is
compared again, the compiled code raises TypeError.
"""

from __future__ import annotations

import os

from mypy.build import build
from mypy.modulefinder import BuildSource
from mypy.nodes import ComparisonExpr, NameExpr
from mypy.options import Options
from mypy.types import AnyType, UnionType, get_proper_type
from test_compiled import MODULES, ROOT, dotted


def is_with_none(comparison: ComparisonExpr) -> bool:
    right = comparison.operands[1]
    return comparison.operators[0] in {"is", "is not"} and isinstance(right, NameExpr) and right.name == "None"


def test_what_is_compared_with_none_may_be_none_or_not() -> None:
    options = Options()
    options.export_types = options.preserve_asts = options.ignore_missing_imports = True
    options.incremental, options.cache_dir, options.follow_imports = False, os.devnull, "skip"
    types = build([BuildSource(str(ROOT / path), dotted(path)) for path in MODULES], options).types
    compared = [node for node in types if isinstance(node, ComparisonExpr) and is_with_none(node)]
    assert compared
    known = [node for node in compared if not isinstance(get_proper_type(types[node.operands[0]]), AnyType | UnionType)]
    assert not known, [f"line {node.line}: {node.operands[0]}" for node in known]
