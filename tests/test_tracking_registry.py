"""The registry: one version per generator, and a champion that jobs replace only by a better one."""

import json
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tracking_helpers
from evaluation_helpers import load_generator
from mlflow import MlflowClient
from tracking_helpers import (
    DATA,
    candidate,
    champion_version,
    client_of,
    curve,
    new_database,
    open_small,
    shorten,
    small_generator,
)

from pipeline.errors import UserError
from pipeline.model import generator_sha256, save_generator
from pipeline.storage import Storage
from pipeline.tracking import logged_model, registry
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import CONNECT_LIMITS
from pipeline.tracking.logged_model import input_example
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.model_card import license_note, measured
from pipeline.tracking.registry import (
    UPLOAD_LIMITS,
    RegisteredVersion,
    promote,
    register_candidate,
)
from pipeline.tracking.run import TrackedRun


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    """One open run in one database for the whole module."""
    folder = tmp_path_factory.mktemp("runs")
    new_database(folder)
    return open_small(TrackingConfig(), Storage(str(folder)) / "run", "registry")


@pytest.fixture
def config(request: pytest.FixtureRequest) -> TrackingConfig:
    """A separate registered model for every test."""
    return TrackingConfig(model_name=re.sub(r"\W", "-", request.node.name))


def register(
    tracked: TrackedRun,
    config: TrackingConfig,
    folder: Path,
    value: float,
    *,
    seed: int = 0,
    images: str = DATA,
    metric: str = "psnr_y",
) -> RegisteredVersion:
    """Registers a generator; another seed is another generator."""
    path = folder / f"{seed}.safetensors"
    small_generator(path, seed)
    return tracking_helpers.register(
        tracked, path, 10 + seed, {metric: value}, model_name=config.model_name, metric=metric,
        evaluation_set=images,
    )  # fmt: skip


def aliases(tracked: TrackedRun, config: TrackingConfig) -> dict[str, int]:
    """Alias to version."""
    model = client_of(tracked).get_registered_model(config.model_name)
    return {alias: int(version) for alias, version in model.aliases.items()}


def test_the_first_version_becomes_champion(tracked, config, tmp_path) -> None:
    registered = register(tracked, config, tmp_path, 30.0)
    assert (registered.version, registered.champion) == (1, True)
    assert aliases(tracked, config) == {"champion": 1, "challenger": 1}


def test_a_better_version_becomes_champion_and_a_worse_one_does_not(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=1)
    better = register(tracked, config, tmp_path, 31.0, seed=2)
    worse = register(tracked, config, tmp_path, 30.5, seed=3)
    assert (better.champion, worse.champion) == (True, False)
    assert worse.reason == "not better: psnr_y 30.5000 against 31.0000 of version 2"
    assert aliases(tracked, config) == {"champion": 2, "challenger": 3}
    assert champion_version(config.model_name, tracked.uri) == 2


def test_an_equal_value_is_not_better(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=1)
    assert not register(tracked, config, tmp_path, 30.0, seed=2).champion


def test_distances_are_better_when_smaller(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 0.2, seed=1, metric="feature_distance")
    assert not register(tracked, config, tmp_path, 0.3, seed=2, metric="feature_distance").champion
    assert register(tracked, config, tmp_path, 0.1, seed=3, metric="feature_distance").champion


def test_a_champion_chosen_by_another_metric_is_not_compared(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 0.2, seed=1, metric="lpips")
    other = register(tracked, config, tmp_path, 40.0, seed=2)
    assert not other.champion
    assert other.reason == (
        "champion version 1 was chosen by lpips and this version by psnr_y; to promote it: python jobs/promote.py "
        f"--model-version 2 --tracking.model_name {config.model_name}"
    )


def test_the_name_of_a_set_does_not_matter(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=1, metric="Set14/psnr_y")
    better = register(tracked, config, tmp_path, 31.0, seed=2, metric="set_14/psnr_y")
    assert better.champion
    assert better.reason == "better: set_14/psnr_y 31.0000 against 30.0000 of version 1"


def test_values_on_other_images_are_not_compared(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=1)
    other = register(tracked, config, tmp_path, 40.0, seed=2, images="f" * 64)
    assert not other.champion
    assert "measured on other images" in other.reason
    assert "promote.py --model-version 2" in other.reason


def test_a_value_that_is_not_finite_is_never_better(tracked, config, tmp_path) -> None:
    registered = register(tracked, config, tmp_path, float("nan"))
    assert not registered.champion
    assert "no finite psnr_y" in registered.reason
    assert champion_version(config.model_name, tracked.uri) is None


def test_registering_again_returns_the_same_version(tracked, config, tmp_path) -> None:
    first = register(tracked, config, tmp_path, 30.0)
    again = register(tracked, config, tmp_path, 30.0)
    assert again.version == first.version
    assert again.champion
    assert len(client_of(tracked).search_model_versions(f"name = '{config.model_name}'")) == 1
    sha256 = generator_sha256(load_generator(tmp_path / "0.safetensors")[0].state_dict())
    query = f"tags.`esrgan.generator_sha256` = '{sha256}'"
    assert len(client_of(tracked).search_logged_models([tracked.experiment_id], query)) == 1


def test_an_interrupted_registration_is_completed(tracked, config, tmp_path, monkeypatch) -> None:
    def interrupt(*args, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logged_model, "write_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        register(tracked, config, tmp_path, 30.0, seed=50)
    monkeypatch.undo()
    assert register(tracked, config, tmp_path, 30.0, seed=50).version == 1
    query = f"name = 'generator-{60:08d}'"
    models = client_of(tracked).search_logged_models([tracked.experiment_id], query)
    assert [model.status for model in models] == ["READY"]


def test_metrics_are_linked_with_the_logged_model(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.25, seed=60)
    query = f"name = 'generator-{70:08d}'"
    (model,) = client_of(tracked).search_logged_models([tracked.experiment_id], query)
    assert [(point.key, point.value, point.step) for point in model.metrics] == [("psnr_y", 30.25, 70)]
    assert model.metrics[0].dataset_digest == DATA[:36]
    assert (70, 30.25) in [(step, value) for step, _, value in curve(tracked, "psnr_y")]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": config.model_name, "version": 1}]


def test_a_champion_replaced_by_a_worse_job_meanwhile_is_promoted_again(
    tracked, config, tmp_path, monkeypatch
) -> None:
    register(tracked, config, tmp_path, 29.0, seed=1)
    # Compared with version 1, as the better job below does, and about to set the alias after it.
    worse = register(tracked, config, tmp_path, 30.0, seed=2).version
    promote(config.model_name, 1, tracked.uri)
    overwrite_alias_once(monkeypatch, worse)
    better = register(tracked, config, tmp_path, 31.0, seed=3)
    assert better.champion
    assert better.reason == "better: psnr_y 31.0000 against 30.0000 of version 2"
    assert champion_version(config.model_name, tracked.uri) == 3


def test_a_job_overtaken_by_a_better_one_reports_that_it_is_not_champion(
    tracked, config, tmp_path, monkeypatch
) -> None:
    register(tracked, config, tmp_path, 29.0, seed=1)
    better = register(tracked, config, tmp_path, 31.0, seed=2).version
    promote(config.model_name, 1, tracked.uri)
    overwrite_alias_once(monkeypatch, better)
    worse = register(tracked, config, tmp_path, 30.0, seed=3)
    assert not worse.champion
    assert worse.reason == "not better: psnr_y 30.0000 against 31.0000 of version 2"
    assert champion_version(config.model_name, tracked.uri) == 2


def overwrite_alias_once(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Another job sets `champion` to `version` right after the next job has set it."""
    real = MlflowClient.set_registered_model_alias

    def set_and_overwrite(self: MlflowClient, name: str, alias: str, number: str) -> None:
        real(self, name, alias, number)
        if alias == "champion":
            monkeypatch.setattr(MlflowClient, "set_registered_model_alias", real)
            real(self, name, alias, str(version))

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_and_overwrite)


def test_of_two_first_versions_at_once_the_better_one_ends_as_champion(
    tracked, config, tmp_path, monkeypatch
) -> None:
    real = MlflowClient.create_registered_model

    def create_late(self: MlflowClient, name: str) -> None:
        monkeypatch.setattr(MlflowClient, "create_registered_model", real)
        # The other job registers and promotes its version between this job's start and its own version.
        assert register(tracked, config, tmp_path, 30.0, seed=2).champion
        real(self, name)

    monkeypatch.setattr(MlflowClient, "create_registered_model", create_late)
    assert register(tracked, config, tmp_path, 31.0, seed=3).champion
    assert champion_version(config.model_name, tracked.uri) == 2


def test_promotion_by_hand_returns_the_previous_champion(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 31.0, seed=1)
    register(tracked, config, tmp_path, 30.0, seed=2)
    assert promote(config.model_name, 2, tracked.uri) == 1
    assert champion_version(config.model_name, tracked.uri) == 2


def test_a_version_replaced_by_hand_is_not_promoted_again(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 29.0, seed=1)
    register(tracked, config, tmp_path, 31.0, seed=2)
    promote(config.model_name, 1, tracked.uri)
    third = register(tracked, config, tmp_path, 30.0, seed=3)
    assert third.champion
    assert champion_version(config.model_name, tracked.uri) == 3


def test_a_removed_champion_alias_is_restored_only_by_hand(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=1)
    client_of(tracked).delete_registered_model_alias(config.model_name, "champion")
    for value, seed in ((29.0, 2), (31.0, 3), (30.0, 1)):
        after = register(tracked, config, tmp_path, value, seed=seed)
        assert not after.champion
        assert after.reason == (
            "the alias champion was removed; to promote it: python jobs/promote.py "
            f"--model-version {after.version} --tracking.model_name {config.model_name}"
        )
    assert champion_version(config.model_name, tracked.uri) is None
    promote(config.model_name, 2, tracked.uri)
    assert register(tracked, config, tmp_path, 32.0, seed=4).champion


def test_earlier_results_are_logged_for_comparison_and_not_registered(tracked, config, tmp_path) -> None:
    path = tmp_path / "g.safetensors"
    small_generator(path, 300)
    described = candidate(tracked, path, 500, {"psnr_y": 28.0}, model_name=config.model_name)
    for _ in range(2):
        trained = described.description.generator
        logged_model.log_model(client_of(tracked), tracked, described, trained, path.read_bytes())
    query = f"name = 'generator-{500:08d}'"
    (model,) = client_of(tracked).search_logged_models([tracked.experiment_id], query)
    assert [(point.key, point.value) for point in model.metrics] == [("psnr_y", 28.0)]
    assert client_of(tracked).search_registered_models(f"name = '{config.model_name}'") == []


@pytest.mark.parametrize("suffix", ["@champion", "/1"])
def test_a_generator_is_downloaded_as_it_was(tracked, config, tmp_path, suffix) -> None:
    register(tracked, config, tmp_path, 30.0, seed=4)
    path = pull_generator(f"models:/{config.model_name}{suffix}", tracked.uri)
    pulled, info = load_generator(path)
    original, _ = load_generator(tmp_path / "4.safetensors")
    assert generator_sha256(pulled.state_dict()) == generator_sha256(original.state_dict())
    assert info["residual_scale_source"] == "metadata"


def test_a_generator_can_be_downloaded_by_its_model_id(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=5)
    query = f"name = 'generator-{15:08d}'"
    model = client_of(tracked).search_logged_models([tracked.experiment_id], query)[0]
    load_generator(pull_generator(f"models:/{model.model_id}", tracked.uri))


def test_non_finite_weights_are_neither_registered_nor_downloaded(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=78)
    path = pull_generator(f"models:/{config.model_name}/1", tracked.uri)
    generator, _ = load_generator(path)
    torch.nn.init.constant_(generator.conv_hr.bias, torch.inf)
    save_generator(generator, path)
    with pytest.raises(UserError, match=f"models:/{config.model_name}/1: .*conv_hr.bias holds non-finite"):
        pull_generator(f"models:/{config.model_name}/1", tracked.uri)
    with pytest.raises(UserError, match=r"conv_hr.bias holds non-finite"):
        tracking_helpers.register(tracked, path, 9, {"psnr_y": 31.0})


def test_a_corrupt_file_is_refused(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0, seed=77)
    path = pull_generator(f"models:/{config.model_name}/1", tracked.uri)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="corrupt"):
        pull_generator(f"models:/{config.model_name}/1", tracked.uri)


def test_a_missing_model_alias_version_or_database_is_a_one_line_error(tracked, config, tmp_path) -> None:
    register(tracked, config, tmp_path, 30.0)
    name = config.model_name
    for uri, server, message in [
        ("models:/nobody@champion", tracked.uri, "no such registered model; known: "),
        (f"models:/{name}@best", tracked.uri, "no such alias; known: challenger, champion"),
        (f"models:/{name}/9", tracked.uri, "no such version; known: 1"),
        (f"models:/{name}", tracked.uri, "not a registered model; write"),
        (f"models:/{name}/latest", tracked.uri, "not a registered model; write"),
        (f"models:/{name}/1", f"sqlite:///{tmp_path}/none.db", "no such file"),
        (f"models:/m-{'0' * 32}", tracked.uri, "rejected by"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            pull_generator(uri, server)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UserError, match="no such version"):
        promote(name, 9, tracked.uri)
    with pytest.raises(UserError, match="no such registered model"):
        promote("nobody", 1, tracked.uri)


def test_a_name_that_mlflow_rejects_is_a_user_error(tracked, config, tmp_path) -> None:
    with pytest.raises(UserError, match="registering a/b"):
        register(tracked, config.model_copy(update={"model_name": "a/b"}), tmp_path, 30.0)


def test_the_card_contains_the_generators_origin(tracked, config, tmp_path) -> None:
    path = tmp_path / "g.safetensors"
    small_generator(path, 88)
    described = candidate(
        tracked, path, 98, {"psnr_y": 30.0}, model_name=config.model_name, license="CC0 images",
        config_text="seed: 3\nuri: http://me:geheim@host\n",
    )  # fmt: skip
    images = {"bicubic, stage 1, stage 2": np.zeros((100, 400, 3), np.uint8)}
    register_candidate(tracked, replace(described, images=images))
    folder = pull_generator(f"models:/{config.model_name}/1", tracked.uri).parent.parent
    text = (folder / "README.md").read_text()
    for part in (
        "CC0 images",
        DATA,
        "| held out | **this model** | 30.00 |",
        tracked.run_id,
        "(image-0.png)",
    ):
        assert part in text
    assert (folder / "image-0.png").is_file()
    assert (folder / "config.yaml").read_text() == "seed: 3\nuri: http://***@host\n"
    assert not list(folder.rglob("*.pkl"))
    version = client_of(tracked).get_model_version(config.model_name, "1")
    assert version.description.startswith(f"# {config.model_name}")
    # MLflow's page does not resolve links to a version's files.
    assert "](" not in version.description
    assert "- bicubic, stage 1, stage 2: `image-0.png`" in version.description
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert np.asarray(example["inputs"]).shape == (1, 24, 32, 3)


def test_the_card_shows_both_kinds_of_metrics_and_what_chose_the_checkpoint() -> None:
    metrics = {"psnr_y": 21.0, "lpips": 0.3, "Set14/psnr_y": 23.25, "Set14/lpips": 0.25}
    text = measured(metrics, {"Set14/psnr_y": 22.0, "Set14/lpips": 0.5}, "Set14/lpips")
    assert text.startswith(
        "| images | upscaled by | PSNR (Y), dB ↑ | LPIPS ↓ |\n"
        "| --- | --- | --- | --- |\n"
        "| held out | **this model** | 21.00 | 0.3000 |\n"
        "| Set14 | bicubic | 22.00 | 0.5000 |\n"
        "| Set14 | **this model** | 23.25 | 0.2500 |\n"
    )
    assert text.endswith("this one was chosen by LPIPS on Set14.")
    assert measured({}, {}, "psnr_y").startswith("It was not validated")


def test_a_license_note_quotes_the_text_that_came_with_the_images() -> None:
    assert license_note({"train": None, "held_out": " \n"}).startswith("Not stated.")
    note = license_note({"train": "CC0\nby all", "held_out": "CC0\nby all\n"})
    assert note.endswith("Images (train, held_out):\n\n    CC0\n    by all")
    assert len(license_note({"train": "x" * 9000})) < 1700


def test_the_example_is_the_input_at_the_start_of_a_validation_image() -> None:
    lr = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    strip = np.concatenate([lr.repeat(4, 0).repeat(4, 1), np.zeros((192, 400, 3), np.uint8)], axis=1)
    assert np.array_equal(input_example({"a": strip}, 4), lr[:24, :32])


@pytest.mark.slow
def test_a_silent_server_fails_in_bounded_time(config, tmp_path, monkeypatch) -> None:
    shorten(CONNECT_LIMITS, monkeypatch, at_most_s=10)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # Accepts, and never answers.
        unreachable = TrackedRun(f"http://127.0.0.1:{silent.getsockname()[1]}", "0" * 32, "1", str(tmp_path))
        began = time.monotonic()
        with pytest.raises(UserError, match=r"^registering [\w-]+: .*no answer in time$"):
            register(unreachable, config, tmp_path, 30.0)
        assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_server_that_stops_answering_fails_in_bounded_time(config, tmp_path, monkeypatch) -> None:
    shorten(UPLOAD_LIMITS, monkeypatch, at_most_s=60)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        # It answered the first request.
        monkeypatch.setattr(registry, "connect", lambda uri: MlflowClient(uri, uri))
        began = time.monotonic()
        with pytest.raises(UserError, match=r"^registering [\w-]+: rejected by .*no answer in time\)$"):
            register(TrackedRun(uri, "0" * 32, "1", str(tmp_path)), config, tmp_path, 30.0)
        assert time.monotonic() - began < 90
