"""`make bench`: how figures become tables and verdicts. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.figures import ALONE, CONNECTIONS, SECTIONS, THROUGHPUTS, WORDS, Run, collect, median, worst_and_best
from benchmarks.goals import GOALS, Goal, Part, Verdict, judge
from benchmarks.plot import PANELS, can_plot
from benchmarks.race import Results
from benchmarks.report import goals_table, report, table
from benchmarks.way import PROCESSES


def goal(**changes: object) -> Goal:
    ratios = ((Part("ours", ("a",)), Part("theirs", ("a",))), (Part("ours", ("b",)), Part("theirs", ("b",))))
    return Goal(**({"title": "a and b, of theirs", "ratios": ratios, "goal": 2.0, "stretch": 4.0} | changes))  # type: ignore[arg-type]


# Figures


def test_values_of_all_rounds_are_collected_and_what_was_measured_once_is_among_them() -> None:
    run = collect({"ws": {"idle": 1.0}}, {"ws": [{"http": 5.0}, {"http": 7.0, "reconnect": 2.0}]}, {"alone": 3.0})
    assert run == {"ws": {"idle": [1.0], "http": [5.0, 7.0], "reconnect": [2.0]}, ALONE: {"alone": [3.0]}}
    assert median(run, "ws", "http") == 6.0


def test_what_was_not_measured_has_no_median() -> None:
    run = collect({}, {"ws": [{}]}, {})
    assert median(run, "ws", "http") is None
    assert median(run, "nobody", "http") is None


def test_more_is_better_for_rates_and_worse_for_times_and_memory() -> None:
    assert worst_and_best("down_8", [3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert worst_and_best("idle_1_p99", [3.0, 1.0, 2.0]) == (3.0, 1.0)


def test_goals_and_panels_name_figures_that_there_are() -> None:
    named = {key for each in GOALS for ratio in each.ratios for part in ratio for key in part.keys}
    assert named | {key for keys in PANELS.values() for key in keys} <= WORDS.keys()
    assert len(WORDS) == sum(len(columns) for columns in SECTIONS.values()), "a key has two columns"


# Goals


def ours(a: float, b: float) -> Run:
    return {"ours": {"a": [a], "b": [b]}, "theirs": {"a": [1.0], "b": [10.0]}}


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [(1.0, 39.0, "missed"), (1.0, 40.0, "met"), (4.0, 10.0, "met"), (2.0, 80.0, "met, also the stretch goal")],
)
def test_a_goal_is_for_the_geometric_mean_of_the_ratios(
    a: float, b: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.goals.GOALS", (goal(),))
    [verdict] = judge(ours(a, b))
    assert verdict.value == pytest.approx((a * b / 10) ** 0.5)
    assert verdict.word == word


def test_some_figures_must_not_exceed_the_goal() -> None:
    assert Verdict(goal(at_most=True, stretch=1.0), (2.1,)).word == "missed"
    assert Verdict(goal(at_most=True, stretch=1.0), (1.1,)).word == "met"
    assert Verdict(goal(at_most=True, stretch=1.0), (1.0,)).word == "met, also the stretch goal"


def test_a_goal_without_all_of_its_figures_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.goals.GOALS", (goal(),))
    [verdict] = judge({"ours": {"a": [1.0], "b": [1.0]}, "theirs": {"a": [1.0]}})
    assert (verdict.value, verdict.word) == (None, "not measured")


def test_both_ends_are_added() -> None:
    both = Part("ours", ("relay", "gateway"))
    assert both.of({"ours": {"relay": [1.0, 2.0, 9.0], "gateway": [3.0]}}) == 5.0
    assert both.of({"ours": {"relay": [1.0]}}) is None


# The report

EVERYTHING = collect(
    {"ws": dict.fromkeys(WORDS, 1.0)},
    {"direct": [{"http": 20_000.0}, {"http": 30_000.0}, {"http": 22_000.0}], "ws": [{}], "nobody": [{}]},
    {"far_last_byte": 1.0},
)


def test_a_cell_is_a_median_and_the_worst_and_the_best() -> None:
    lines = table(EVERYTHING, ["http"], ["requests/s"]).splitlines()
    assert [line.replace(" ", "") for line in lines] == [
        "||requests/s|",
        "|---|--:|",
        "|direct|22,000(20,000to30,000)|",
        "|ws|1|",
    ]
    assert len({len(line) for line in lines}) == 1


def test_a_report_has_all_sections_with_something_in_them() -> None:
    text = report(EVERYTHING, judge(EVERYTHING))
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == ["Goals", *SECTIONS]
    assert "nobody" not in text
    assert "### Memory" not in report({"direct": {"http": [1.0]}}, [])


def test_the_goals_have_their_figure_and_the_range_of_their_ratios() -> None:
    lines = goals_table([Verdict(goal(), (1.0, 16.0)), Verdict(goal(stretch=None, at_most=True), ())]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "a and b, of theirs",
        "4 (1 to 16)",
        "at least 2",
        "4",
        "met, also the stretch goal",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["", "at most 2", "", "not measured"]


def test_a_run_is_written_as_tables_as_json_and_as_a_plot(tmp_path: Path) -> None:
    from benchmarks.__main__ import write

    results = Results(memory={}, rounds={}, failures=["ssh, memory, streams: it hangs"])
    text = write(tmp_path / "out", EVERYTHING, results, "a machine")
    assert text.startswith("a machine\n\n### Goals")
    assert text.endswith("\nNot measured:\n\n- ssh, memory, streams: it hangs\n")
    assert (tmp_path / "out" / "bench.md").read_text() == text
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert saved["figures"] == EVERYTHING
    assert saved["goals"].keys() == {each.title for each in GOALS}
    assert (tmp_path / "out" / "bench.svg").exists() is can_plot()


def test_columns_that_many_goals_share_are_those_of_the_report() -> None:
    assert {*THROUGHPUTS} == {*SECTIONS["Throughput, MB/s"]}
    assert {*CONNECTIONS} <= {*SECTIONS["Connections"]}
    assert all(f"{name}_cpu_gib" in WORDS for name in PROCESSES)
