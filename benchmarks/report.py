"""The report of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .figures import SECTIONS, Run, median, worst_and_best
from .goals import Verdict

__all__ = ["goals_table", "report", "table"]


def report(run: Run, verdicts: Iterable[Verdict]) -> str:
    """All tables, each with a heading. A table that would be empty is left out."""
    parts = [f"### Goals\n\n{goals_table(verdicts)}"]
    for title, columns in SECTIONS.items():
        if any(key in figures for figures in run.values() for key in columns):
            parts.append(f"### {title}\n\n{table(run, [*columns], [*columns.values()])}")
    return "\n\n".join(parts)


def table(run: Run, keys: Sequence[str], words: Sequence[str]) -> str:
    """A row for each contestant, and a column for each figure."""
    rows = [["", *words]]
    for name, figures in run.items():
        if any(key in figures for key in keys):
            rows.append([name, *(_cell(run, name, key) for key in keys)])
    return _markdown(rows)


def goals_table(verdicts: Iterable[Verdict]) -> str:
    rows = [["", "measured", "goal", "stretch", "result"]]
    for verdict in verdicts:
        goal, least = verdict.goal, "at most" if verdict.goal.at_most else "at least"
        stretch = "" if goal.stretch is None else _number(goal.stretch)
        rows.append([goal.title, _measured(verdict), f"{least} {_number(goal.goal)}", stretch, verdict.word])
    return _markdown(rows)


def _measured(verdict: Verdict) -> str:
    if verdict.value is None:
        return ""
    text = _number(verdict.value)
    if len(verdict.ratios) > 1:
        text += f" ({_number(min(verdict.ratios))} to {_number(max(verdict.ratios))})"
    return text


def _cell(run: Run, name: str, key: str) -> str:
    value = median(run, name, key)
    if value is None:
        return ""
    values = run[name][key]
    if len(values) == 1:
        return _number(value)
    return f"{_number(value)} ({' to '.join(map(_number, worst_and_best(key, values)))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *("--:" for _ in rows[0][1:])], *rows[1:]]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"| {label.ljust(first)} | {' | '.join(map(str.rjust, cells, others))} |" for label, *cells in lines
    )
