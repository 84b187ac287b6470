"""Everything that an exception can show: texts, reprs, tracebacks with locals."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]


def everything_shown(error: BaseException) -> str:
    """All that a report of `error` with local variables shows, less the source lines and the tests' own frames."""
    shown = [str(error), repr(error), repr(error.args)]
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        pending += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
        report = traceback.TracebackException.from_exception(each, capture_locals=True)
        shown += [str(report), *report.format_exception_only()]
        for frame in report.stack:
            if not Path(frame.filename).is_relative_to(TESTS):
                shown.append(repr(frame.locals))
    return "\n".join(shown)
