"""A sweep: Ray Tune proposes values, each trial is a complete training run, and the best trial is reported.

Trials are compared by their last validation: that of the EMA weights at the final step. The best validation of stage 2
by PSNR is its first one, before the GAN losses had an effect, so its ranking of the trials would be noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from pipeline.data import check_source, has_manifest, load_manifest, plans_held_out, prepare
from pipeline.errors import UserError, without_secrets
from pipeline.run_folder import SWEEP, TRIAL_VALUES, TrialOutcome
from pipeline.section import with_fields
from pipeline.storage import Storage
from pipeline.tracking.run import TrackedRun, finish_run, open_parent, require_tracking
from pipeline.tracking.uri import resolve_uri
from pipeline.training import ray_cluster
from pipeline.training.checks import (
    check_before_start,
    perceptual_features,
    require_metric,
    with_absolute_paths,
)
from pipeline.training.config import TrainConfig
from pipeline.training.initial import Initial, origins, require_fit, resolve, store
from pipeline.training.run import run_training, summary
from pipeline.training.selection import with_selection
from pipeline.training.validation_sets import find_sets
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.figure import tradeoff_figure
from pipeline.tuning.progress import SweepProgress
from pipeline.tuning.space import Values, digest, distributions, extremes, trial_config, trial_name
from pipeline.tuning.sweep_folder import claim, keep_outcome, outcomes, unfinished


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep."""

    run_id: str
    """MLflow's id of the parent run."""
    trials: list[TrialOutcome]
    best: TrialOutcome
    figure: str
    """Path of the figure of the searched fields against the metric."""


def run_sweep(config: TrainConfig, settings: TuneConfig, prepare_command: str | None = None) -> SweepResult:
    """Runs the sweep, or its remaining trials.

    Args:
        config: the trials' configuration, except for the searched fields.
        settings: what is searched.
        prepare_command: refuse a missing data set with this command in the message, instead of preparing it.

    Raises:
        UserError: invalid values, a sweep of the same name with another search space, or no trial that finished.
    """
    base = _trial_base(config)
    require_metric("tune.metric", settings.metric, base)
    if base.worker_range[1] == 0:
        raise UserError("workers=0: a sweep's trials run on Ray Train; give at least 1")
    sweep = Storage(base.storage) / settings.name
    known = SWEEP.read(sweep)
    base, initial = resolve(base, sweep, known.initial if known else {}, begun=known is not None)
    # The sizes are adopted now; a trial that searches other sizes must not adopt them again.
    base = with_fields(base, {"init.adopt_sizes": False})
    _check_trials(base, settings, sweep, initial)
    has_data = has_manifest(base.data.root)
    _require_held_out(base, settings, has_data)
    base = with_selection(base, has_held_out=True)
    find_sets(base)
    if not has_data:
        check_source(base.data, prepare_command)
    require_tracking(base.tracking, base.storage)
    claim(sweep, base, settings, origins(initial))
    store(sweep, initial)
    ended = outcomes(sweep)

    ray_cluster.connect(base)
    if not has_data:
        prepare(base.data)
    print(summary(base, load_manifest(base.data.root)), flush=True)
    parent = open_parent(
        base.tracking,
        base.storage,
        name=settings.name,
        key=f"sweep-{digest(sweep.uri)}",
        parameters={"tune": settings.model_dump_json(), "storage": base.storage},
    )
    status = "FAILED"
    try:
        if len(ended) >= settings.trials:
            print(
                f"sweep {settings.name} has finished with {settings.trials} trials; nothing to do", flush=True
            )
        else:
            _search(base, settings, sweep, ended, parent)
        result = _conclude(settings, sweep, parent)
        status = "FINISHED"
        return result
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        finish_run(parent, status)


def _trial_base(config: TrainConfig) -> TrainConfig:
    """`config` with absolute paths; a trial registers no model."""
    absolute = with_absolute_paths(config)
    uri = resolve_uri(absolute.tracking, absolute.storage)
    tracking = absolute.tracking.model_copy(update={"uri": uri, "register_model": False})
    return absolute.model_copy(update={"tracking": tracking})


def _check_trials(
    base: TrainConfig, settings: TuneConfig, sweep: Storage, initial: Mapping[str, Initial]
) -> None:
    """Preflight checks of all trials. Raises UserError."""
    trials = [trial_config(base, values) for values in extremes(settings)]
    check_before_start(base, sweep)
    checked = [base.perceptual] if base.gan.steps and base.gan.perceptual_weight else []
    for trial in trials:
        if trial.perceptual not in checked and perceptual_features(trial):
            checked.append(trial.perceptual)
        if trial.init == base.init:
            require_fit(trial, initial)
        else:
            resolve(trial, sweep, {}, begun=False)


def _require_held_out(base: TrainConfig, settings: TuneConfig, has_data: bool) -> None:
    """Raises UserError if the data set has no held-out set, so that no trial would be validated."""
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


def _search(
    base: TrainConfig, settings: TuneConfig, sweep: Storage, ended: list[TrialOutcome], parent: TrackedRun
) -> None:
    resumed = unfinished(sweep, {outcome.run_name for outcome in ended})
    started = len(ended) + len(resumed)
    if started:
        print(
            f"resuming sweep {settings.name}: {len(ended)} trials have ended, {len(resumed)} resume",
            flush=True,
        )
    search = OptunaSearch(
        distributions(settings),
        metric=settings.metric,
        mode=settings.mode,
        # A sampler with the same seed as before would propose the same values again.
        sampler=_sampler(settings, base.seed + started),
        points_to_evaluate=resumed or None,
    )
    for outcome in ended:
        if _is_measured(outcome, settings.metric):
            search.add_evaluated_point(outcome.values, outcome.metrics[settings.metric])

    # Ray Tune pickles the driver and the callbacks into the sweep's folder, so the tracking URI, which may contain a
    # password, is passed by reference.
    tracking_uri, parent_run_id = ray.put(parent.uri), parent.run_id
    tracking = base.tracking.model_copy(update={"uri": without_secrets(parent.uri)})
    base = base.model_copy(update={"tracking": tracking})
    final_step = base.psnr.steps + base.gan.steps

    def driver(values: Values) -> None:
        name = trial_name(values)
        own = {"run_name": name, "storage": sweep.path("trials"), "tracking.uri": ray.get(tracking_uri)}
        trial = trial_config(base, values | own)
        TRIAL_VALUES.at(name=name).write(sweep, values)
        # A sweep that resumes after an upgrade compares trials, not bits.
        result = run_training(
            trial,
            callbacks=[TuneReportCallback()],
            parent_run_id=parent_run_id,
            compare_versions=False,
            initial_from=sweep.uri,
        )
        final = result.final_metrics
        keep_outcome(sweep, TrialOutcome(name, result.run_id, values, "finished", result.step, final))
        tune.report({**final, "step": result.step})

    tuner = tune.Tuner(
        # A driver only waits for its workers; if it reserved a CPU, driver and workers could deadlock.
        tune.with_resources(driver, {"CPU": 0, "memory": 2**20}),
        tune_config=tune.TuneConfig(
            num_samples=settings.trials - len(ended),
            search_alg=ConcurrencyLimiter(search, max_concurrent=settings.max_concurrent),
            scheduler=_scheduler(settings, final_step),
            metric=settings.metric,
            mode=settings.mode,
            trial_name_creator=lambda trial: trial_name(trial.config),
        ),
        run_config=tune.RunConfig(
            name=f"{settings.name}-{started}",
            storage_path=sweep.path("ray"),
            callbacks=[SweepProgress(settings, sweep, tracking_uri, parent.experiment_id, final_step)],
            verbose=0,
        ),
    )
    tuner.fit()


def _conclude(settings: TuneConfig, sweep: Storage, parent: TrackedRun) -> SweepResult:
    trials = outcomes(sweep)
    metric = settings.metric
    finished = [trial for trial in trials if trial.status == "finished" and _is_measured(trial, metric)]
    if not finished:
        reasons = [f"{trial.run_name}: {trial.reason}" for trial in trials if trial.reason]
        shown = "; ".join(reasons)[:400] or "see the log"
        raise UserError(f"tune.name={settings.name}: no trial finished ({shown})")
    choose = max if settings.mode == "max" else min
    best = choose(finished, key=lambda trial: trial.metrics[metric])
    sweep.write_bytes("tradeoff.png", tradeoff_figure(trials, metric, best))
    return SweepResult(parent.run_id, trials, best, sweep.path("tradeoff.png"))


def _is_measured(outcome: TrialOutcome, metric: str) -> bool:
    return math.isfinite(outcome.metrics.get(metric, math.nan))


def _sampler(settings: TuneConfig, seed: int) -> optuna.samplers.BaseSampler:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.search == "optuna":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed)


def _scheduler(settings: TuneConfig, final_step: int) -> TrialScheduler:
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        # One more than the final step: ASHA stops trials that reach max_t, even one that is about to finish.
        max_t=final_step + 1,
        grace_period=min(settings.grace_steps, final_step),
        reduction_factor=settings.reduction_factor,
    )
