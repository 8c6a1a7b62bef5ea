"""Progress of long work in a log."""

import sys
from collections.abc import Iterator

import pytest
import tqdm.std

from pipeline.progress import progress_bar


def test_a_log_has_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])

    def images() -> Iterator[int]:
        for index in range(6):
            clock[0] += 4
            yield index

    assert list(progress_bar(images(), total=6, unit=" images")) == list(range(6))
    assert list(progress_bar(images(), total=6, unit=" images", desc="cutting")) == list(range(6))
    lines = ["3/6 images,  0.25 images/s, 00:12 left", "6/6 images,  0.25 images/s, 00:00 left"]
    assert capsys.readouterr().err.splitlines() == [*lines, *(f"cutting: {line}" for line in lines)]


def test_quick_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1, 2], total=2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar([1, 2], total=2, unit=" images")) == [1, 2]
    assert "2/2" in capsys.readouterr().err
