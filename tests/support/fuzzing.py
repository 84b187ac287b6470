"""What makes a test a fuzz target: `@fuzzed()` above its `@given`, and nothing else.

In `make test-all` a target runs a few examples, the same ones each time; in `make test` it runs a third of them. In
`make fuzz` it runs ten times as many, others in each round, round after round; a failure prints how to repeat it. It
is kept in `.hypothesis`, and comes first the next time. What was found becomes a test of its own, with a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings

__all__ = ["examples", "fuzzed", "fuzzed_machine", "searching"]

_PROFILE: Final = os.environ.get("HYPOTHESIS_PROFILE")
SEARCHING: Final = _PROFILE == "fuzz"
_FACTOR: Final = 10

_Test = TypeVar("_Test", bound=Callable[..., Any])


def examples(number: int) -> int:
    """So many in `make test-all`, a third of them in `make test`: for tests whose examples are costly."""
    return number // 3 if _PROFILE is None else number


def searching(max_examples: int = 100, **changes: Any) -> settings:
    """How a target runs: `max_examples` in `make test-all`, and with no deadline, since the machine may be shared."""
    if not SEARCHING:
        return settings(max_examples=examples(max_examples), derandomize=True, deadline=None, **changes)
    return settings(
        max_examples=max_examples * _FACTOR,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        **changes,
    )


def fuzzed(max_examples: int = 100, **changes: Any) -> Callable[[_Test], _Test]:
    """Make a test of properties a fuzz target."""

    def decorate(test: _Test) -> _Test:
        marked: _Test = pytest.mark.fuzz(searching(max_examples, **changes)(test))
        return marked

    return decorate


def fuzzed_machine(case: Any, max_examples: int = 100, **changes: Any) -> Any:
    """The same for the `TestCase` of a state machine."""
    case.settings = searching(max_examples, **changes)
    case.pytestmark = [pytest.mark.fuzz]
    return case
