"""JSON files of a run folder: written and read by type; one policy for corrupt ones."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run_folder import FAULTS, IDENTITY, RESULT, TRIAL_PLAN, Fault, RunIdentity, TrialPlan, page
from pipeline.storage import Storage


def test_what_is_written_is_read_back_as_its_type(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    faults = [Fault(20, "died", "a worker's process ended", 1), Fault(20, "error", "ValueError: é", 2)]
    FAULTS.write(run, faults)
    assert FAULTS.read(run) == faults


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert IDENTITY.read(Storage(str(tmp_path))) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 3}', b"\xff"])
def test_a_corrupt_file_is_refused_with_its_path_and_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: corrupt \(.+\); restore it or choose another run_name"):
        IDENTITY.read(Storage(str(tmp_path)))


def test_a_corrupt_file_without_a_remedy_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "result.json").write_text('{"step": "many"}')
    assert RESULT.read(Storage(str(tmp_path))) is None
    assert "result.json: corrupt" in caplog.text


def test_a_path_with_a_field_is_filled_in(tmp_path: Path) -> None:
    sweep = Storage(str(tmp_path))
    plan = TrialPlan(0, {"gan.steps": 3})
    TRIAL_PLAN.at(name="trial-1").write(sweep, plan)
    assert (tmp_path / "trials" / "trial-1" / "trial.json").is_file()
    assert TRIAL_PLAN.at(name="trial-1").read(sweep) == plan


def test_a_later_version_may_add_fields(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    identity = RunIdentity("key", {"seed": 0}, "0" * 64)
    IDENTITY.write(run, identity)
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace('"key"', '"later": 1,\n  "key"', 1))
    assert IDENTITY.read(run) == identity


def test_the_page_is_current() -> None:
    page_file = Path(__file__).parent.parent / "docs" / "run_folder.md"
    assert page_file.read_text(encoding="utf-8") == page(), (
        "python -m pipeline.run_folder > docs/run_folder.md"
    )
