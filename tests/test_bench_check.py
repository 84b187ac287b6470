"""`make bench-check`: what it calls worse. It measures nothing here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import counts

RECORDED = {"round trip": {"task steps": 4.0, "function calls": 600.0}, "new connection": {"task steps": 20.0}}


def measured(**changes: float) -> dict[str, counts.Counts]:
    return {
        "round trip": {"task steps": changes.get("steps", 4.0), "function calls": changes.get("calls", 600.0)},
        "new connection": {"task steps": 20.0},
    }


def test_a_twentieth_more_is_allowed_and_less_is_welcome() -> None:
    assert counts.excesses(measured(), RECORDED) == []
    assert counts.excesses(measured(calls=630.0), RECORDED) == []
    assert counts.excesses(measured(calls=1.0, steps=0.0), RECORDED) == []


def test_each_figure_above_that_is_named() -> None:
    assert counts.excesses(measured(calls=640.0, steps=5.0), RECORDED) == [
        "round trip: 5 task steps, 4 recorded (+25%)",
        "round trip: 640 function calls, 600 recorded (+7%)",
    ]


def test_what_is_not_recorded_or_not_measured_is_not_judged() -> None:
    assert counts.excesses(measured(calls=9999.0), {"round trip": {"task steps": 4.0}}) == []
    assert counts.excesses(measured(), RECORDED | {"download": {"copied bytes": 2.0}}) == []  # there is no compiler


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="there is no way to preload it")
def test_bytes_that_are_copied_count_and_those_that_are_not_do_not(tmp_path: Path) -> None:
    program = """if True:
        import ctypes
        copied = ctypes.c_ulonglong.in_dll(ctypes.CDLL(None), "copied_bytes")
        before, payload = copied.value, bytes(100_000)
        assert copied.value == before
        b"".join((payload, payload))
        assert copied.value == before + 200_000
        view = memoryview(payload)[1:]
        assert copied.value == before + 200_000
        bytes(view)
        assert copied.value == before + 299_999
    """
    environment = os.environ | {"LD_PRELOAD": str(counts._build_counter(tmp_path))}
    subprocess.run((sys.executable, "-c", program), env=environment, check=True, timeout=60)


def run(monkeypatch: pytest.MonkeyPatch, record: Path, **changes: float) -> None:
    monkeypatch.setattr(counts, "RECORD", record)
    monkeypatch.setattr(counts, "measure", lambda: measured(**changes))
    counts.main()


def test_without_a_record_for_these_versions_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["counts"])
    record = tmp_path / "counts.json"
    run(monkeypatch, record)
    record.write_text(json.dumps({"Python 2.7": RECORDED}))
    run(monkeypatch, record)
    assert capsys.readouterr().out.count(f"nothing is recorded for {counts.versions()}") == 2


def test_what_was_recorded_is_what_it_compares_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "counts.json"
    record.write_text(json.dumps({"Python 2.7": RECORDED}))
    monkeypatch.setattr(sys, "argv", ["counts", "--record"])
    run(monkeypatch, record, steps=3.0)
    assert [*json.loads(record.read_text())] == ["Python 2.7", counts.versions()]
    monkeypatch.setattr(sys, "argv", ["counts"])
    run(monkeypatch, record, steps=3.1)
    with pytest.raises(SystemExit, match=r"benchmarks\.counts --record"):
        run(monkeypatch, record, steps=4.0)


def test_the_record_in_this_checkout_can_be_read() -> None:
    for figures in json.loads(counts.RECORD.read_text()).values():
        assert counts.excesses(figures, figures) == []
