"""The sender: segments of published checkpoints arrive once and in order, whatever fails."""

import errno
import json

import pytest
from tracking_helpers import (
    client_of,
    curve,
    event,
    events_of,
    everything,
    files_in,
    new_database,
    open_small,
    records_between,
    write_segments,
)

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking import sender, upload
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.pending import upload_pending
from pipeline.tracking.run import finish_run
from pipeline.tracking.sender import Sender
from pipeline.tracking.spool import Metrics, discard_after, write_segment

CONFIG = TrackingConfig()
WAIT_S = 300


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A folder for runs, with one database for the whole module."""
    folder = tmp_path_factory.mktemp("runs")
    new_database(folder)
    return Storage(str(folder))


@pytest.fixture
def run(storage: Storage, request: pytest.FixtureRequest) -> Storage:
    return storage / request.node.name


def sent(run: Storage, tracked, published: int) -> int:
    """Sends all segments up to `published`; returns how many were not sent."""
    with Sender(run, CONFIG, tracked, published_step=lambda: published) as sender:
        return sender.flush(WAIT_S)


def test_points_keep_their_own_steps_and_times(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    assert sent(run, tracked, 20) == 0
    assert curve(tracked, "loss/pixel") == [
        (step, 1_700_000_000_000 + step, 1 / step) for step in range(1, 21)
    ]


def test_a_segment_waits_for_its_checkpoint(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 30)
    sent(run, tracked, 20)
    assert len(curve(tracked, "loss/pixel")) == 20
    sent(run, tracked, 30)
    assert len(curve(tracked, "loss/pixel")) == 30


def test_sending_again_duplicates_nothing(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    write_segment(
        run,
        30,
        [*records_between(20, 30), event(21, "resumed at step 20"), Metrics(30, 5, {"x": float("nan")})],
    )
    sent(run, tracked, 30)
    before = everything(tracked)
    run.remove("tracking/sent.json")
    sent(run, tracked, 30)
    after = everything(tracked)
    assert str(after) == str(before)
    assert len(before["images"]) == 3 * 2
    assert before["events"] == ["step       21  2023-11-14 22:13:20.021 UTC  resumed at step 20"]


def test_segments_up_to_the_mark_are_not_sent_again(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 30)
    sent(run, tracked, 20)
    assert json.loads(run.read_bytes("tracking/sent.json")) == {"run_id": tracked.run_id, "step": 20}
    steps = []
    real = sender.send_segment
    monkeypatch.setattr(sender, "send_segment", lambda *args: (steps.append(args[2].step), real(*args)))
    sent(run, tracked, 30)
    assert steps == [30]


def test_a_mark_of_another_mlflow_run_does_not_count(run: Storage) -> None:
    first = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    sent(run, first, 20)
    second = open_small(CONFIG, run, run.uri + "-second")
    sent(run, second, 20)
    assert curve(second, "loss/pixel") == curve(first, "loss/pixel")


def test_crashes_between_checkpoints_leave_clean_curves(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    write_segment(
        run, 25, records_between(20, 25)
    )  # Its checkpoint is never published: the attempt ends here.
    sent(run, tracked, 20)
    discard_after(run, 20)
    write_segment(run, 30, records_between(20, 30))
    sent(run, tracked, 30)
    assert [point[0] for point in curve(tracked, "loss/pixel")] == list(range(1, 31))


def test_resuming_before_the_last_sent_step_duplicates_nothing(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    sent(run, tracked, 20)
    discard_after(run, 10)  # The checkpoint of step 20 was corrupt; the points have later times now.
    again = [Metrics(step, 1_800_000_000_000 + step, {"loss/pixel": 1 / step}) for step in range(11, 31)]
    write_segment(run, 30, again)
    sent(run, tracked, 30)
    assert [point[0] for point in curve(tracked, "loss/pixel")] == list(range(1, 31))


def test_events_are_one_list_and_resuming_earlier_keeps_all_of_them(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segment(run, 10, [event(10, "the tenth"), event(2, "two\nlines")])
    write_segment(run, 20, [event(15, "the fifteenth")])
    sent(run, tracked, 20)
    discard_after(run, 10)  # The checkpoint of step 20 was corrupt.
    write_segment(run, 30, [event(10, "resuming at step 10")])
    sent(run, tracked, 30)
    assert [line.partition("UTC  ")[2] for line in events_of(tracked)] == [
        "two lines", "resuming at step 10", "the tenth", "the fifteenth",
    ]  # fmt: skip
    assert client_of(tracked).get_run(tracked.run_id).data.tags["esrgan.events"] == "4"


def test_a_full_disk_delays_the_mark_and_nothing_else(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)

    def full(self: Storage, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Storage, "write_bytes", full)
    assert sent(run, tracked, 20) == 0
    monkeypatch.undo()
    assert not run.exists("tracking/sent.json")
    sent(run, tracked, 20)
    assert len(curve(tracked, "loss/pixel")) == 20
    assert len(files_in(tracked, "images")) == 4


def test_points_that_mlflow_rejects_block_nothing(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segment(run, 10, [Metrics(10, 1000, {"bad:key?": 1.0, "y" * 400: 2.0})])
    write_segment(run, 20, [Metrics(20, -5, {"refused": 1.0})])
    write_segment(run, 30, records_between(20, 30))
    assert sent(run, tracked, 30) == 0
    assert curve(tracked, "bad_key_") == [(10, 1000, 1.0)]
    assert len(curve(tracked, "loss/pixel")) == 10


def test_a_corrupt_segment_blocks_nothing(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 30)
    run.write_bytes("tracking/00000020.jsonl", b"{")
    assert sent(run, tracked, 30) == 0
    assert len(curve(tracked, "loss/pixel")) == 20


def test_images_are_stored_where_the_page_expects_its_slider(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 10)
    sent(run, tracked, 10)
    small, large = files_in(tracked, "images")
    assert large.startswith("validation~astronaut+step+10+timestamp+1700000000010+")
    assert large.endswith(".png")
    assert small == large.removesuffix(".png") + "+compressed.webp"
    assert client_of(tracked).get_run(tracked.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_more_points_than_fit_in_a_call_arrive(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "POINTS_PER_CALL", 7)
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    sent(run, tracked, 20)
    assert len(curve(tracked, "loss/pixel")) == len(curve(tracked, "train/steps_per_s")) == 20


@pytest.mark.slow
def test_an_error_of_the_server_does_not_reach_training(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 10)
    real, failures = sender.send_segment, [RuntimeError("broken"), OSError("unreachable")]

    def sometimes(*args) -> None:
        if failures:
            raise failures.pop()
        real(*args)

    monkeypatch.setattr(sender, "send_segment", sometimes)
    assert sent(run, tracked, 10) == 0
    assert len(curve(tracked, "loss/pixel")) == 10


def test_flush_returns_after_its_timeout(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args) -> None:
        raise OSError("unreachable")

    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    monkeypatch.setattr(sender, "send_segment", never)
    with Sender(run, CONFIG, tracked, published_step=lambda: 20) as thread:
        assert thread.flush(0.2) == 2


def test_a_command_sends_the_rest_and_sets_the_status(run: Storage) -> None:
    tracked = open_small(CONFIG, run, run.uri)
    write_segments(run, 20)
    run.write_bytes("checkpoints/gan-00000020/manifest.json", b"{}")
    finish_run(None, "KILLED", run)
    assert client_of(tracked).get_run(tracked.run_id).info.status == "RUNNING"
    result = upload_pending(run, None)
    assert (result.run_id, result.status, result.sent) == (tracked.run_id, "KILLED", 2)
    assert client_of(tracked).get_run(tracked.run_id).info.status == "KILLED"
    assert upload_pending(run, None).sent == 0
    assert len(curve(tracked, "loss/pixel")) == 20


def test_sending_from_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        upload_pending(Storage(str(tmp_path)), None)


def test_a_masked_uri_must_be_given_again(run: Storage) -> None:
    run.write_bytes(
        "tracking/mlflow.json",
        json.dumps(
            {
                "experiment": "e", "uri": "http://***@host", "run_name": "r", "parameters": {}, "tags": {},
                "config_text": "",
            }
        ).encode(),
    )  # fmt: skip
    with pytest.raises(UserError, match="ESRGAN_TRACKING__URI"):
        upload_pending(run, None)
