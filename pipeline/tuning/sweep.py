"""A sweep: Ray Tune chooses values, each trial is a whole training run, and the best one is named.

Trials are compared by their last validation: that of the EMA weights at the final step. The best one of stage 2 is by
PSNR the first, before the GAN losses changed anything, and would rank noise.

The sweep's folder is STORAGE/NAME/:

    sweep.json          what is searched and what stays fixed; a sweep with other values is another sweep
    trials/<run name>/  the trials' run folders, named by their values
    outcomes/*.json     one for each trial that ended
    tradeoff.png        every searched field against the metric

Ray Tune's own snapshot is not used for resuming: it lags, and it forgets limits. What lies in these folders says which
trials ended, and which began; those that began go on from their own checkpoints.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from pipeline.config import Config, with_fields
from pipeline.data import check_source, has_manifest, load_manifest, plans_held_out, prepare
from pipeline.errors import UserError, without_secrets
from pipeline.run_folder import IDENTITY
from pipeline.storage import Storage
from pipeline.tracking.run import TrackedRun, finish_run, open_parent, require_tracking
from pipeline.tracking.uri import resolve_uri
from pipeline.training import ray_trainer
from pipeline.training.checks import (
    check_before_start,
    perceptual_features,
    require_metric,
    with_absolute_paths,
)
from pipeline.training.config import TrainConfig
from pipeline.training.identity import learning_fields
from pipeline.training.run import run_training, summary
from pipeline.tuning.config import Choice, TuneConfig, Uniform
from pipeline.tuning.picture import tradeoff_picture

logger = logging.getLogger(__name__)

Values = dict[str, float | str]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    run_name: str
    run_id: str | None
    """MLflow's id."""
    values: Values
    """The searched fields."""
    status: str
    """finished, stopped (early, by the scheduler) or failed."""
    step: int
    """Where `metrics` were measured: the final step, or where the trial was stopped."""
    metrics: dict[str, float]
    """The last validation of the EMA weights."""
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind."""

    run_id: str
    """MLflow's id of the parent run."""
    trials: list[Outcome]
    best: Outcome
    picture: str


def run_sweep(config: Config, prepare_command: str | None = None) -> SweepResult:
    """Runs the sweep, or what is left of it.

    Args:
        config: the validated configuration.
        prepare_command: refuse a missing data set with this command in the message, instead of preparing it.

    Raises:
        UserError: bad values, a sweep of the same name that searches something else, or no trial that finished.
    """
    base = _base(config)
    settings = config.tune
    require_metric("tune.metric", settings.metric)
    if base.worker_range[1] == 0:
        raise UserError("workers=0: a sweep's trials run on Ray Train; give at least 1")
    storage = Storage(base.storage)
    sweep = storage / settings.name
    trials = [_trial_config(base, values) for values in _extremes(settings)]
    check_before_start(base, sweep)
    checked = [base.perceptual] if base.gan.steps and base.gan.perceptual_weight else []
    for trial in trials:
        if trial.perceptual not in checked and perceptual_features(trial):
            checked.append(trial.perceptual)
    has_data = has_manifest(base.data.root)
    _require_held_out(base, settings, has_data)
    if not has_data:
        check_source(base.data, prepare_command)
    require_tracking(base.tracking, base.storage)
    _claim(sweep, base, settings)

    ray_trainer.connect(base)
    if not has_data:
        prepare(base.data)
    print(summary(base, load_manifest(base.data.root)), flush=True)
    parent = open_parent(
        base.tracking,
        base.storage,
        name=settings.name,
        key=f"sweep-{_digest(sweep.uri)}",
        parameters={"tune": settings.model_dump_json(), "storage": base.storage},
    )
    status = "FAILED"
    try:
        if len(outcomes(sweep)) >= settings.trials:
            print(f"sweep {settings.name} has ended with {settings.trials} trials; nothing to do", flush=True)
        else:
            _search(base, settings, sweep, parent)
        result = _conclude(settings, sweep, parent)
        status = "FINISHED"
        return result
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        finish_run(parent, status)


def outcomes(sweep: Storage) -> list[Outcome]:
    """The trials that ended, in the order of their names."""
    return [Outcome(**json.loads(sweep.read_bytes(f"outcomes/{name}"))) for name in sweep.names("outcomes")]


def _base(config: Config) -> TrainConfig:
    absolute = with_absolute_paths(config.alone())
    tracking = absolute.tracking.model_copy(
        # A trial is a trial: only a run of its own should hand out models.
        update={
            "uri": resolve_uri(absolute.tracking, absolute.storage),
            "register_model": False,
        }
    )
    return absolute.model_copy(update={"tracking": tracking})


def _require_held_out(base: TrainConfig, settings: TuneConfig, has_data: bool) -> None:
    """Raises UserError when no validation would measure the trials."""
    if has_data and load_manifest(base.data.root).held_out:
        return
    if not has_data and plans_held_out(base.data):
        return
    missing = (
        f"data.root={base.data.root}: this data set has no held-out set"
        if has_data
        else "data.held_out: not set"
    )
    advice = "prepare another data.root with data.held_out" if has_data else "give a folder of images"
    raise UserError(f"{missing}, and a sweep ranks its trials by {settings.metric} measured on one; {advice}")


def _search(base: TrainConfig, settings: TuneConfig, sweep: Storage, parent: TrackedRun) -> None:
    ended = outcomes(sweep)
    begun = _begun(sweep, {outcome.run_name for outcome in ended})
    known = len(ended) + len(begun)
    # A sampler that starts again with the same seed would propose the same values again.
    seed = base.seed + known
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = (
        optuna.samplers.TPESampler(seed=seed)
        if settings.search == "optuna"
        else optuna.samplers.RandomSampler(seed)
    )
    search = OptunaSearch(
        {name: _distribution(span) for name, span in settings.space.items()},
        metric=settings.metric,
        mode=settings.mode,
        sampler=sampler,
        points_to_evaluate=begun or None,
    )
    for outcome in ended:
        if _is_measured(outcome, settings.metric):
            search.add_evaluated_point(outcome.values, outcome.metrics[settings.metric])
    if known:
        print(f"sweep {settings.name}: {len(ended)} trials ended before, {len(begun)} go on", flush=True)

    # Tune pickles what it runs into the sweep's folder. So the store's address, with its password, goes by
    # reference.
    address, parent_run_id = ray.put(parent.uri), parent.run_id
    tracking = base.tracking.model_copy(update={"uri": without_secrets(parent.uri)})
    base = base.model_copy(update={"tracking": tracking})

    def driver(values: Values) -> None:
        trial = _trial_config(base, values, sweep, ray.get(address))
        folder = sweep / "trials" / trial.run_name
        folder.write_bytes("values.json", json.dumps(values).encode())
        # A sweep that goes on after an upgrade compares trials, not bits.
        result = run_training(
            trial, callbacks=[TuneReportCallback()], parent_run_id=parent_run_id, compare_versions=False
        )
        final = result.final_metrics
        _keep(sweep, Outcome(trial.run_name, result.run_id, values, "finished", result.step, final))
        tune.report({**final, "step": result.step})

    tuner = tune.Tuner(
        # A driver only waits for its workers; were it to hold a CPU, they could wait for it for ever.
        tune.with_resources(driver, {"CPU": 0, "memory": 2**20}),
        tune_config=tune.TuneConfig(
            num_samples=settings.trials - len(ended),
            search_alg=ConcurrencyLimiter(search, max_concurrent=settings.max_concurrent),
            scheduler=_scheduler(base, settings),
            metric=settings.metric,
            mode=settings.mode,
            trial_name_creator=lambda trial: _run_name(trial.config),
        ),
        run_config=tune.RunConfig(
            name=f"{settings.name}-{known}",
            storage_path=sweep.path("ray"),
            callbacks=[_Watcher(base, settings, sweep, address, parent.experiment_id)],
            verbose=0,
        ),
    )
    tuner.fit()


class _Watcher(tune.Callback):
    """Prints a line for each trial, and keeps the outcome of those that did not get to do it themselves."""

    def __init__(
        self,
        base: TrainConfig,
        settings: TuneConfig,
        sweep: Storage,
        address: ray.ObjectRef,
        experiment_id: str,
    ) -> None:
        self._settings, self._sweep = settings, sweep
        self._address, self._experiment_id = address, experiment_id
        self._last = base.psnr.steps + base.gan.steps

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        shown = ", ".join(f"{name}={_short(value)}" for name, value in trial.config.items())
        print(f"{_run_name(trial.config)} begins: {shown}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial finished, or the scheduler stopped it."""
        self._note(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        error = trial.get_error() if hasattr(trial, "get_error") else None
        lines = str(error).strip().splitlines()
        self._note(trial, "failed", lines[-1] if lines else "its process ended")

    def _note(self, trial: Any, status: str, reason: str = "") -> None:
        name = _run_name(trial.config)
        known = {outcome.run_name: outcome for outcome in outcomes(self._sweep)}
        if name not in known:
            last = trial.last_result or {}
            metrics = {key: value for key, value in last.items() if key.startswith(("psnr_", "ssim_"))}
            identity = IDENTITY.read(self._sweep / "trials" / name)
            run_id = identity.tracking_run_id if identity else None
            known[name] = Outcome(
                name, run_id, dict(trial.config), status, int(last.get("step", 0)), metrics, reason
            )
            _keep(self._sweep, known[name])
            if run_id is not None:
                folder = (self._sweep / "trials" / name).uri
                tracked = TrackedRun(ray.get(self._address), run_id, self._experiment_id, folder)
                finish_run(tracked, "KILLED" if status == "stopped" else "FAILED", reason=reason)
        outcome = known[name]
        metric = self._settings.metric
        shown = f"{metric} {outcome.metrics[metric]:.4f}" if metric in outcome.metrics else outcome.reason
        print(
            f"{name} {outcome.status} at step {outcome.step}/{self._last}: {shown} "
            f"({len(known)}/{self._settings.trials})",
            flush=True,
        )


def _conclude(settings: TuneConfig, sweep: Storage, parent: TrackedRun) -> SweepResult:
    trials = outcomes(sweep)
    sign = 1 if settings.mode == "max" else -1
    finished = [
        trial for trial in trials if trial.status == "finished" and _is_measured(trial, settings.metric)
    ]
    if not finished:
        reasons = (
            "; ".join(f"{trial.run_name}: {trial.reason}" for trial in trials if trial.reason)
            or "see the log"
        )
        raise UserError(f"tune.name={settings.name}: no trial finished ({reasons[:400]})")
    best = max(finished, key=lambda trial: sign * trial.metrics[settings.metric])
    content = tradeoff_picture([asdict(trial) for trial in trials], settings.metric, best.run_name)
    sweep.write_bytes("tradeoff.png", content)
    return SweepResult(parent.run_id, trials, best, sweep.path("tradeoff.png"))


def _trial_config(
    base: TrainConfig,
    values: Mapping[str, Any],
    sweep: Storage | None = None,
    tracking_uri: str | None = None,
) -> TrainConfig:
    """The base with a trial's values, validated again. Raises UserError naming the field."""
    changes: dict[str, Any] = dict(values)
    if sweep is not None:
        changes |= {"run_name": _run_name(values), "storage": sweep.path("trials")}
    if tracking_uri is not None:
        changes["tracking.uri"] = tracking_uri
    try:
        changed = with_fields(Config.model_validate(base.model_dump()), changes)
    except UserError as error:
        raise UserError(f"tune.space: {error}") from None
    return changed.alone()


def _extremes(settings: TuneConfig) -> list[Values]:
    """Values at both ends of every range: if these are allowed, all between are."""
    spans = settings.space.items()
    low = {name: span.low if isinstance(span, Uniform) else span.choice[0] for name, span in spans}
    high = {name: span.high if isinstance(span, Uniform) else span.choice[-1] for name, span in spans}
    single = [{name: choice} for name, span in spans if isinstance(span, Choice) for choice in span.choice]
    return [low, high, *single]


def _claim(sweep: Storage, base: TrainConfig, settings: TuneConfig) -> None:
    """Writes what the sweep is, or checks that it is the same. Raises UserError."""
    fixed = learning_fields(base)
    mine = {
        # Sweeps of older versions compared the best validations; those values do not mix with these.
        "search": settings.model_dump(mode="json", include={"space", "metric", "mode"})
        | {"compared_by": "last validation"},
        "fixed": fixed,
    }
    if not sweep.exists("sweep.json"):
        sweep.write_bytes("sweep.json", json.dumps(mine, indent=2).encode())
        return
    there = json.loads(sweep.read_bytes("sweep.json"))
    if there != json.loads(json.dumps(mine)):
        different = [
            f"{part}.{name}"
            for part in mine
            for name in mine[part]
            if there.get(part, {}).get(name) != mine[part][name]
        ]
        raise UserError(
            f"tune.name={settings.name} is in use with other values of {', '.join(different)}; choose another tune.name"
        )


def _begun(sweep: Storage, ended: set[str]) -> list[Values]:
    """Values of trials that began and did not end."""
    names = [name for name in sweep.names("trials") if name not in ended]
    return [
        json.loads(sweep.read_bytes(f"trials/{name}/values.json"))
        for name in names
        if sweep.exists(f"trials/{name}/values.json")
    ]


def _is_measured(outcome: Outcome, metric: str) -> bool:
    return math.isfinite(outcome.metrics.get(metric, math.nan))


def _keep(sweep: Storage, outcome: Outcome) -> None:
    sweep.write_bytes(f"outcomes/{outcome.run_name}.json", json.dumps(asdict(outcome), indent=2).encode())


def _scheduler(base: TrainConfig, settings: TuneConfig) -> TrialScheduler:
    if settings.scheduler == "none":
        return FIFOScheduler()
    last = base.psnr.steps + base.gan.steps
    return ASHAScheduler(
        time_attr="step",
        # One more than the last step: at the last step itself ASHA would stop a trial that is about to finish.
        max_t=last + 1,
        grace_period=min(settings.grace_steps, last),
        reduction_factor=settings.reduction_factor,
    )


def _distribution(span: Uniform | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(span, Uniform):
        return optuna.distributions.FloatDistribution(span.low, span.high, log=span.log)
    return optuna.distributions.CategoricalDistribution(span.choice)


def _run_name(values: Mapping[str, Any]) -> str:
    return f"trial-{_digest(json.dumps(values, sort_keys=True))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
