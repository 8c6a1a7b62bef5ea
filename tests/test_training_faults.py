"""Faults: which of them end a run, saving on SIGTERM, refusing storage, and warnings."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import write_photos, write_sets

from pipeline.errors import UserError
from pipeline.run_folder import GROUP, Fault, Refusal, TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.spool import Event, read_segment, segment_steps
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.advice import INTERVALS, Advisor
from pipeline.training.faults import Decision, RestartPolicy
from pipeline.training.state import TrainState
from pipeline.training.stopping import STOP, saving_on_sigterm


def died(step: int) -> Fault:
    return Fault(step, "died", "a worker stopped: its process ended", 0)


def error(text: str) -> Fault:
    return Fault(4, "error", text, 0)


DIVERGED = Fault(4, "diverged", "step 9: non-finite", 0)


@pytest.mark.parametrize(
    ("faults", "refusal", "done", "expected"),
    [
        ([], None, True, Decision("continue")),
        ([], None, False, Decision("retry")),
        # A run that makes progress may be restarted any number of times.
        ([died(step) for step in range(100)], None, False, Decision("retry")),
        ([died(step) for step in range(100)], None, True, Decision("continue")),
        ([died(4)] * 3, None, False, Decision("retry")),
        (
            [died(4)] * 4, None, False,
            Decision("give up", "4 faults since step 4 without a new checkpoint (faults.max_restarts=3); the last: "
                     "a worker stopped: its process ended"),
        ),
        ([error("KeyError: 'x'")] * 2, None, False, Decision("retry")),
        (
            [error("KeyError: 'x'")] * 3, None, False,
            Decision("give up", "the same error 3 times since step 4: KeyError: 'x'"),
        ),
        ([error("KeyError: 'x'"), error("another"), error("KeyError: 'x'")], None, False, Decision("retry")),
        ([DIVERGED], None, False, Decision("retry")),
        ([DIVERGED, DIVERGED], None, False, Decision("give up", "step 9: non-finite", user_error=True)),
        # The workers of a group that must not start end at once, without a failure.
        ([DIVERGED, DIVERGED], None, True, Decision("give up", "step 9: non-finite", user_error=True)),
        (
            [died(4)] * 3 + [DIVERGED], None, False,
            Decision("give up", "4 faults since step 4 without a new checkpoint (faults.max_restarts=3); the last: "
                     "step 9: non-finite", user_error=True),
        ),
        ([], Refusal("no weights"), True, Decision("give up", "no weights", user_error=True)),
        ([died(4)], Refusal("no weights"), False, Decision("give up", "no weights", user_error=True)),
    ],
)  # fmt: skip
def test_restart_policy(faults: list[Fault], refusal: Refusal | None, done: bool, expected: Decision) -> None:
    assert RestartPolicy(max_restarts=3).decide(faults, refusal, done) == expected


def test_the_reason_of_a_worker_group_restart(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    assert faults.restart_reason(run, faults.load(run), 2) == ""
    faults.record(run, 3, "died", "its process ended")
    assert faults.restart_reason(run, faults.load(run), 1) == "after a fault (its process ended)"
    # A node has joined: the earlier failure is not the reason.
    assert faults.restart_reason(run, faults.load(run), 2) == "in place of 1"
    assert faults.restart_reason(run, faults.load(run), 2) == ""
    faults.clear(run)
    assert faults.restart_reason(run, faults.load(run), 1) == ""
    assert list(tmp_path.iterdir()) == [tmp_path / GROUP.path]


def test_faults_are_recorded_in_the_runs_folder(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    assert faults.load(run) == []
    faults.record(run, 3, "error", "first")
    faults.record(run, 5, "died", "second")
    assert [(each.step, each.text) for each in faults.load(run)] == [(3, "first"), (5, "second")]
    faults.clear(run)
    assert faults.load(run) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("faults"))


def train(folder: Path, **changes: Any) -> TrainingResult:
    return tiny.train(folder, **changes)


def events(run: Storage) -> list[str]:
    return [
        record.text
        for step in segment_steps(run)
        for record in read_segment(run, step).records
        if isinstance(record, Event)
    ]


@pytest.mark.slow
def test_a_gpu_with_too_little_memory_names_the_fields_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", 1, 64, seed=1)
    write_photos(tmp_path / "held_out", 1, 64, seed=2)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB."
        )

    monkeypatch.setattr("pipeline.training.stepper.on_device", full)
    with pytest.raises(UserError) as raised:
        train(tmp_path, **{"tracking.uri": "none"})
    assert str(raised.value) == (
        "batch_size=4, crop_px=32: CUDA out of memory. Tried to allocate 2.00 GiB; lower one of them, or use "
        "precision=bf16"
    )


@pytest.mark.slow
def test_sigterm_saves_and_the_next_attempt_resumes_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = train(folder, run_name="undisturbed")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    run = Storage(str(folder / "runs" / "stopped"))
    long = {"checkpoint_every_steps": 1000, "validate_every_steps": 1000, "run_name": "stopped"}
    from pipeline.training.run_log import RunLog

    interval = RunLog.interval

    def stopped_at_step_4(log: RunLog, state: TrainState, values: Any) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            while not STOP.is_open(run):
                threading.Event().wait(0.01)
        interval(log, state, values)

    monkeypatch.setattr(RunLog, "interval", stopped_at_step_4)
    with pytest.raises(SystemExit) as ended:
        train(folder, **long)
    assert ended.value.code == 128 + signal.SIGTERM
    # Requested while step 4 is logged, agreed on at the end of the next interval.
    assert [str(name) for name in checkpoints.listed(run)] == ["psnr-00000005"]
    assert not STOP.is_open(run)
    assert json.loads(run.read_bytes("tracking/mlflow.json"))["status"] == "KILLED"

    monkeypatch.setattr(RunLog, "interval", interval)
    result = train(folder, **long)
    assert result.generator_sha256 == undisturbed.generator_sha256
    resumed = [event for event in events(run) if event.startswith("resuming")]
    assert resumed == ["resuming at step 5 (psnr stage, 1 worker)"]
    assert "resuming at step 5" in capsys.readouterr().out


def test_a_grace_time_that_is_too_short_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "3")
    run = Storage(str(tmp_path))
    with saving_on_sigterm(run), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not STOP.is_open(run)


def full_disk(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint files find no space."""
    from pipeline.training import checkpointer

    real = checkpointer.write
    left = [times]

    def write(*args: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpointer, "write", write)


@pytest.mark.slow
def test_a_disk_that_is_full_for_some_time_loses_no_metrics_and_changes_no_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(folder, run_name="roomy")
    full_disk(2, monkeypatch)
    result = train(folder, run_name="tight")
    assert result.generator_sha256 == undisturbed.generator_sha256
    run = Storage(str(folder / "runs" / "tight"))
    warnings = [text for text in events(run) if "could not be written" in text]
    assert warnings
    assert "No space left on device" in warnings[0]
    from pipeline.tracking.spool import Metrics

    points = {
        (record.step, key)
        for step in segment_steps(run)
        for record in read_segment(run, step).records
        if isinstance(record, Metrics)
        for key in record.values
    }
    assert {step for step, key in points if key == "loss/pixel"} == set(range(1, 13))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(1000, monkeypatch)
    with pytest.raises(UserError, match=r"storage=.*could not be written \(No space left on device\)"):
        train(folder, run_name="full")


def interval(**changes: float) -> dict[str, float]:
    return {
        "loss_pixel": 0.1,
        "data_wait_share": 0.0,
        "discriminator_accuracy": 0.8,
        "steps_per_s": 1.0,
        **changes,
    }


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"data_wait_share": 0.5}, "wait 50% of the time for data"),
        ({"discriminator_accuracy": 1.0}, "lower gan.discriminator_learning_rate"),
        ({"discriminator_accuracy": 0.5}, "raise gan.discriminator_learning_rate"),
        ({"loss_pixel": 0.25}, "has not changed"),
    ],
)
def test_a_warning_is_logged_once_and_again_after_it_cleared(bad: dict[str, float], words: str) -> None:
    advisor, warnings = Advisor(), []
    for index in range(3 * INTERVALS):
        warnings += advisor.update(interval(**{"loss_pixel": 0.1 + 0.01 * index, **bad}))
    assert len(warnings) == 1
    assert words in warnings[0]
    for index in range(INTERVALS):
        assert advisor.update(interval(loss_pixel=0.1 + 0.01 * index)) == []
    again = [
        text
        for index in range(INTERVALS)
        for text in advisor.update(interval(**{"loss_pixel": 0.1 + 0.01 * index, **bad}))
    ]
    assert len(again) == 1
