"""Progress in a log."""

import pytest

from pipeline.evaluation import progress


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.with_progress("abcdef", 6)) == list("abcdef")
    assert capsys.readouterr().err.splitlines() == [
        "3/6 images, 0.25 images/s, 0:00:12 left",
        "6/6 images, 0.25 images/s, 0:00:00 left",
    ]


def test_quick_work_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.with_progress([1, 2], 2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_hours_and_minutes_are_told_apart() -> None:
    assert progress.progress_line(10, 4010, 10) == "10/4010 images, 1.00 images/s, 1:06:40 left"
