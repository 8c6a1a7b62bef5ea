"""A sweep: Ray Tune runs trials with values that Optuna proposes, and their last validations are compared.

By default trials are compared by their last validation: that of the EMA weights at the final step. The best validation
of stage 2 by PSNR is its first one, before the GAN losses had an effect, so its ranking of the trials would be noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from pipeline.data import Manifest, check_source, has_manifest, load_manifest, plans_held_out, prepare
from pipeline.errors import UserError
from pipeline.model.features import PROVIDED, file_sha256
from pipeline.run_folder import SWEEP
from pipeline.section import with_fields
from pipeline.storage import Storage, only_writer
from pipeline.tracking.pending import send_unsent
from pipeline.tracking.run import TrackedRun, finish_run, open_parent, require_parent
from pipeline.tracking.sweep import log_sweep
from pipeline.tracking.uri import resolve_uri
from pipeline.training import ray_cluster
from pipeline.training.checks import (
    check_before_start,
    perceptual_features,
    require_fitting_data,
    require_metric,
    with_absolute_paths,
)
from pipeline.training.config import TrainConfig
from pipeline.training.initial import Initial, origins, require_fit, resolve, save_copies
from pipeline.training.run import summary
from pipeline.training.selection import with_selection
from pipeline.training.stopping import saving_on_sigterm
from pipeline.training.validation_sets import find_sets
from pipeline.tuning import stage_one, sweep_folder
from pipeline.tuning.best_config import best_yaml
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.constraint import Constraint
from pipeline.tuning.ranking import compare_trials, in_order
from pipeline.tuning.ray_tune import fitting, run_jobs
from pipeline.tuning.result import SweepResult
from pipeline.tuning.rungs import require_rungs
from pipeline.tuning.space import check_space, digest
from pipeline.tuning.takeaway import sweep_files
from pipeline.tuning.trial_queue import TrialQueue


def run_sweep(
    config: TrainConfig, settings: TuneConfig, prepare_command: str | None = None, retry_failed: bool = False
) -> SweepResult:
    """Runs the sweep, or its remaining trials.

    Args:
        config: the trials' configuration, except for the searched fields.
        prepare_command: refuse a missing data set with this command in the message, instead of preparing it.
        retry_failed: also repeat the trials that failed in training; those that lost their process or could not write
            are repeated anyway.

    Raises:
        UserError: invalid values, a sweep of the same name with another search space, or no trial that finished.
    """
    base = trial_base(config)
    for metric in settings.metrics:
        require_metric("tune.metrics", metric, base)
    for text in settings.constraints:
        require_metric("tune.constraints", Constraint.parse(text).metric, base)
    sweep = Storage(base.storage) / settings.name
    known = SWEEP.read(sweep)
    base, initial = resolve(base, sweep, known.initial if known else {}, begun=known is not None)
    # The sizes are adopted now; a trial that searches other sizes must not adopt them again.
    base = with_fields(base, {"init.adopt_sizes": False})
    prepared = load_manifest(base.data.root) if has_manifest(base.data.root) else None
    weights = check_trials(base, settings, sweep, initial, prepared)
    base = with_selection(base, _require_images(base, settings, prepared))
    sets = find_sets(base)
    sha256 = prepared.sha256 if prepared else ""
    identity = sweep_folder.identity_of(base, settings, sha256, sets, origins(initial), weights)
    sweep_folder.check(sweep, settings, identity)
    sweep_folder.outcomes(sweep)  # a corrupt one is refused before Ray starts
    if prepared is None:
        check_source(base.data, prepare_command)
    require_parent(base.tracking, base.storage)

    refusal = f"tune.name={settings.name}: another process runs this sweep ({sweep.uri}); wait for it or stop it first"
    with only_writer(sweep, refusal):
        needed = base if base.worker_range[1] else base.model_copy(update={"workers": 1})
        # Trials write log files (of workers on an object store, see ray_trainer): Ray would print its own messages.
        ray_cluster.connect(needed, log_to_driver=base.worker_range[1] > 0 and sweep.remote)
        if prepared is None:
            prepare(base.data)
        manifest = load_manifest(base.data.root)
        sweep_folder.claim(sweep, settings, replace(identity, manifest_sha256=manifest.sha256))
        save_copies(sweep, initial)
        slots = slots_of(base, settings, ray.nodes())
        queue = TrialQueue(settings, base, sweep, manifest.sha256, slots, retry_failed)
        # The last line describes the processes of one run.
        print(*summary(base, manifest).splitlines()[:-1], _processes(queue), sep="\n", flush=True)
        parent = open_parent(
            base.tracking,
            base.storage,
            name=settings.name,
            key=f"sweep-{digest(sweep.uri)}",
            parameters={"tune": settings.model_dump_json(), "storage": base.storage},
        )
        status = "FAILED"
        try:
            with saving_on_sigterm(sweep):
                _run(queue, parent)
            result = conclude(queue, with_absolute_paths(config), parent)
            status = "KILLED" if queue.stopping else "FINISHED"
            return result
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            finish_run(parent, status)


def _run(queue: TrialQueue, parent: TrackedRun) -> None:
    name = queue.settings.name
    if queue.plans:
        ended = len(queue.outcomes)
        print(
            f"resuming sweep {name}: {ended} trials have ended, {len(queue.plans) - ended} resume", flush=True
        )
    if queue.total < queue.settings.trials:
        print(
            f"tune.trials={queue.settings.trials}: the space has {queue.total} different values; all are run",
            flush=True,
        )
    if queue.done:
        print(f"sweep {name} has finished with {len(queue.outcomes)} trials; nothing to do", flush=True)
    else:
        run_jobs(queue, parent)


def trial_base(config: TrainConfig) -> TrainConfig:
    """`config` with absolute paths; a trial registers no model, and trains in its own process if it has one worker.

    The tracking server is required when the sweep starts; if it is unreachable later, trials train and send later.
    """
    absolute = with_absolute_paths(config)
    uri = resolve_uri(absolute.tracking, absolute.storage)
    changes = {"uri": uri, "register_model": False, "if_unreachable": "spool"}
    tracking = absolute.tracking.model_copy(update=changes)
    workers = 0 if absolute.worker_range[1] <= 1 else absolute.workers
    return absolute.model_copy(update={"tracking": tracking, "workers": workers})


def check_trials(
    base: TrainConfig,
    settings: TuneConfig,
    sweep: Storage,
    initial: Mapping[str, Initial],
    manifest: Manifest | None = None,
) -> dict[str, str]:
    """Preflight checks of all trials, with the data set's manifest if there is one.

    Returns the sha256 of the weights that they read, by field and file.

    Raises:
        UserError: one line that names the field.
    """
    trials = check_space(settings, base)
    if settings.repeats and "seed" in settings.space:
        raise UserError(
            "tune.repeats: the trials are repeated with other seeds, so seed cannot be in tune.space"
        )
    for trial in trials:
        require_rungs(settings, trial)
        if manifest is not None:
            require_fitting_data(trial, manifest)
    # The process that runs the sweep needs no GPU; those of the trials do.
    check_before_start(base.model_copy(update={"use_gpu": False}), sweep)
    checked = [base.perceptual] if base.gan.steps and base.gan.perceptual_weight else []
    digests = {}
    for trial in trials:
        if trial.perceptual not in checked and perceptual_features(trial):
            checked.append(trial.perceptual)
        if trial.init == base.init:
            require_fit(trial, initial)
            continue
        for network, each in origins(resolve(trial, sweep, {}, begun=False)[1]).items():
            digests[f"init.{network}={each.source}"] = each.sha256
    for name in {each.weights for each in checked} - PROVIDED:
        digests[f"perceptual.weights={name}"] = file_sha256(Path(name))
    return digests


def _require_images(base: TrainConfig, settings: TuneConfig, manifest: Manifest | None) -> bool:
    """Whether there is a held-out set. Raises UserError if a metric is to be measured on one, and there is none."""
    has_held_out = bool(manifest.held_out) if manifest else plans_held_out(base.data)
    metrics = [*settings.metrics, *(Constraint.parse(text).metric for text in settings.constraints)]
    on_held_out = [metric for metric in dict.fromkeys(metrics) if "/" not in metric]
    if has_held_out or not on_held_out:
        return has_held_out
    missing = (
        f"data.root={base.data.root}: this data set has no held-out set"
        if manifest
        else "data.held_out: not set"
    )
    advice = "prepare another data.root with data.held_out" if manifest else "give a folder of images"
    raise UserError(
        f"{missing}, and a sweep ranks its trials by {', '.join(on_held_out)} measured on one; {advice}, or name a "
        "metric of validation.sets"
    )


def slots_of(base: TrainConfig, settings: TuneConfig, nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many trials run at a time: as many as fit into the cluster, so that none waits with others half started.

    Raises:
        UserError: none fits, and no node will be started.
    """
    fits = fitting(base, nodes)
    if base.wait_for_nodes_s and not base.worker_range[1]:
        return settings.max_concurrent  # Ray Tune's waiting trials make the autoscaler start nodes
    if not fits:
        raise UserError(
            f"cpus_per_worker={base.cpus_per_worker:g}{', use_gpu=true' if base.use_gpu else ''}: the cluster's nodes "
            f"do not have room for the {max(1, base.worker_range[0])} worker(s) of a trial; lower it or add nodes"
        )
    if fits < settings.max_concurrent:
        print(
            f"tune.max_concurrent={settings.max_concurrent}: {fits} at a time, as many trials as fit into the cluster",
            flush=True,
        )
        return fits
    return settings.max_concurrent


def _processes(queue: TrialQueue) -> str:
    base = queue.base
    high = base.worker_range[1]
    each = f"{high} Ray Train workers each" if high else "a process each"
    device = "one GPU for each worker" if base.use_gpu else "CPU"
    shared = "; stage 1 is shared" if stage_one.is_shared(queue.settings, base) and base.gan.steps else ""
    return f"trials:  {queue.total}, up to {queue.slots} at a time, {each}; {device}{shared}"


def conclude(queue: TrialQueue, config: TrainConfig, parent: TrackedRun) -> SweepResult:
    """Compares the ended trials, writes the files of the result and logs them to MLflow.

    The paths of `config`, the sweep's configuration, are absolute. Raises UserError: no trial has finished.
    """
    settings, sweep = queue.settings, queue.sweep
    trials = []
    for trial in queue.outcomes.values():
        run = sweep / f"trials/{trial.run_name}"
        send_unsent(run, parent.uri)
        run_id = trial.run_id or sweep_folder.tracking_run_id(run)
        if trial.status != "finished" and run_id:  # a process that was killed has not set its status
            ended, failed = (
                TrackedRun(parent.uri, run_id, parent.experiment_id, run.uri),
                trial.status == "failed",
            )
            finish_run(ended, "FAILED" if failed else "KILLED", reason=trial.reason if failed else "")
        trials.append(replace(trial, run_id=run_id))
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished and not queue.stopping:
        reasons = [f"{trial.run_name}: {trial.reason}" for trial in trials if trial.reason]
        shown = "; ".join(reasons)[:400] or "see the log"
        raise UserError(f"tune.name={settings.name}: no trial finished ({shown})")
    ranking = compare_trials(settings, trials)
    trials = in_order(trials, ranking)
    best = next((trial for trial in trials if trial.run_name == ranking.best), None)

    def keep(files: Mapping[str, bytes], points: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        for name, content in files.items():
            sweep.write_bytes(name, content)
        log_sweep(parent, points, files, (best.run_name, best.run_id) if best else None)

    # What counts is kept before the figures are drawn.
    keep(
        {"best.yaml": best_yaml(config, settings, best)} if best else {},
        [(trial.number, trial.metrics) for trial in finished],
    )
    keep(sweep_files(queue, ranking, trials))
    return SweepResult(
        parent.run_id, trials, best, list(ranking.front) if len(settings.metrics) > 1 else [], list(ranking.tied),
        ranking.noise, ranking.repeated_means(), sweep.path("tradeoff.png"),
    )  # fmt: skip
