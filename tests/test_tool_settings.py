"""The paths that pyproject.toml gives to tools exist: a file that moves leaves its settings behind without a word."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from mutation import JUDGES

ROOT: Final = Path(__file__).parent.parent
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS: Final[dict[str, Any]] = PROJECT["tool"]
MUTMUT: Final = TOOLS["mutmut"]


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(MUTMUT["source_paths"], id="mutmut: source_paths"),
        pytest.param(MUTMUT["also_copy"], id="mutmut: also_copy"),
        pytest.param(MUTMUT["only_mutate"], id="mutmut: only_mutate"),
        pytest.param(MUTMUT["pytest_add_cli_args_test_selection"], id="mutmut: tests"),
        pytest.param(TOOLS["coverage"]["report"]["omit"], id="coverage: omit"),
        pytest.param(TOOLS["mypy"]["files"], id="mypy: files"),
        pytest.param(TOOLS["hatch"]["build"]["targets"]["wheel"]["only-include"], id="hatch: wheel"),
        pytest.param(TOOLS["hatch"]["build"]["targets"]["sdist"]["include"], id="hatch: sdist"),
        pytest.param(TOOLS["pytest"]["ini_options"]["testpaths"], id="pytest: testpaths"),
        pytest.param(TOOLS["pytest"]["ini_options"]["pythonpath"], id="pytest: pythonpath"),
    ],
)
def test_the_paths_of_a_tool_exist(paths: list[str]) -> None:
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_each_mutated_module_has_tests_that_judge_it() -> None:
    mutated = {path.removesuffix(".py").replace("/", ".") for path in MUTMUT["only_mutate"]}
    judging = {Path(path).name for path in MUTMUT["pytest_add_cli_args_test_selection"]}
    assert mutated == JUDGES.keys()
    assert judging == set().union(*JUDGES.values())
