"""Which job comes next, and what follows from its validations and its end. Independent of Ray.

The files of the sweep's folder are the state; everything here is derived from them when the sweep is resumed.
"""

import logging
from dataclasses import replace

from pipeline.errors import UserError, without_secrets
from pipeline.run_folder import OUTCOME, RESULT, TRIAL_PLAN, TrialOutcome, TrialPlan
from pipeline.storage import Storage
from pipeline.tracking.spool import published_step, validations
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.training.stopping import STOP
from pipeline.tuning import stage_one, sweep_folder
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.job import Job, outcome_of
from pipeline.tuning.proposals import as_database, number_of_trials, propose, study
from pipeline.tuning.ranking import compare_trials
from pipeline.tuning.rungs import compared_from, reason_to_stop
from pipeline.tuning.space import Values, shown_metrics, trial_config, trial_name

logger = logging.getLogger(__name__)


class TrialQueue:
    """The trials of a sweep.

    Args:
        base: the trials' configuration, except for the searched fields.
        slots: maximum number of concurrent jobs.
        retry_failed: also repeat the trials that failed in training.
    """

    def __init__(
        self,
        settings: TuneConfig,
        base: TrainConfig,
        sweep: Storage,
        manifest_sha256: str,
        slots: int,
        retry_failed: bool = False,
    ) -> None:
        self.settings, self.base, self.sweep, self.slots = settings, base, sweep, slots
        self._manifest_sha256 = manifest_sha256
        self.is_shared = stage_one.is_shared(settings, base)
        self.total = number_of_trials(settings)
        """Number of trials, without repetitions."""
        self.plans = {trial_name(plan.values): plan for plan in sweep_folder.plans(sweep, settings)}
        self.outcomes: dict[str, TrialOutcome] = {}
        for outcome in sweep_folder.outcomes(sweep):
            if outcome.status == "failed" and (outcome.retry or retry_failed):
                OUTCOME.at(name=outcome.run_name).remove(sweep)
            elif outcome.run_name in self.plans:
                self.outcomes[outcome.run_name] = outcome
        self.running: dict[str, Job] = {}
        self.steps: dict[str, int] = {}
        """The latest known step of every job."""
        self.first_steps: dict[str, int] = {}
        """The step at which every job was started by this submission."""
        self._waiting = [name for name in self.plans if name not in self.outcomes]
        for name in self._waiting:
            STOP.end(sweep / f"trials/{name}")
        for name in sweep.names(stage_one.FOLDER):
            STOP.end(sweep / f"{stage_one.FOLDER}/{name}")
        self.histories = {name: self._history(name) for name in self.plans}
        """Validations of every trial by step of the compared stage."""
        self._failed_stages: dict[str, TrialOutcome] = {}
        self._lost_at: dict[str, int] = {}
        """Step of every job whose process died."""
        self._outside_faults = 0
        """Number of consecutive trials that failed for a reason outside of them."""
        self.failure = ""
        """Why the sweep was stopped, if not by the user."""
        self.stopping = False
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether no job runs and none will follow."""
        if self.running:
            return False
        if not self.stopping:
            self._fill()
        return self.stopping or not self._waiting

    def next(self) -> Job | None:
        """The next job to start now, which counts as running from here on; None: not yet, or `done`."""
        while not self.stopping and len(self.running) < self.slots:
            self._fill()
            ended = len(self.outcomes)
            for name in list(self._waiting):
                if not self.stopping and (job := self._job_for(name)) is not None:
                    self._waiting = [each for each in self._waiting if each != job.name]
                    self.running[job.name] = job
                    first = max(published_step(job.run), job.config.psnr.steps if job.stage_one else 0)
                    self.steps[job.name] = self.first_steps[job.name] = first
                    return job
            if len(self.outcomes) == ended:
                break
        return None

    def _job_for(self, name: str) -> Job | None:
        """What a waiting trial needs next: its stage 1 or its own training. None: it waits for stage 1, or failed."""
        try:
            job = self.job(name)
        except UserError as error:  # a plan of an earlier version
            self._cannot_start(name, str(error))
            return None
        latest = compared_from(job.config) + max(self.histories.get(name, {}), default=0)
        if published_step(job.run) >= latest and self._is_stopped(job):  # not reported before the driver died
            self._waiting.remove(name)
            return None
        stage = stage_one.stage_one_of(job.config, self.base, self._manifest_sha256)
        if stage is None or not self.is_shared or checkpoints.listed(job.run):
            return job
        stage = stage.model_copy(update={"storage": self.sweep.path(stage_one.FOLDER)})
        run = Storage(stage.storage) / stage.run_name
        if failure := self._failed_stages.get(stage.run_name):
            self._cannot_start(name, f"{stage.run_name}: {failure.reason}", failure.retry)
            return None
        if stage_one.is_trained(run, stage.psnr.steps):
            return replace(job, stage_one=run.uri)
        if stage.run_name in self.running:
            return None
        RESULT.remove(run)  # of a run whose last checkpoint is gone: it would count as finished
        return Job(stage.run_name, "stage 1", stage, TrialPlan(-1, {}))

    def _cannot_start(self, name: str, reason: str, retry: bool = False) -> None:
        self._waiting.remove(name)
        self._keep(outcome_of(name, self.plans[name], "failed", reason=reason, retry=retry))

    def validated(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """A job was validated. Stops it if it is among the weak ones at a rung."""
        job = self.running[name]
        self.steps[name] = step
        print(f"{name} step {step}/{job.steps}: {shown_metrics(metrics, metrics)}", flush=True)
        start = compared_from(job.config)
        if job.kind != "trial" or step <= start:
            return
        self.histories.setdefault(name, {})[step - start] = metrics
        if self._is_stopped(job):
            STOP.make(job.run)

    def _is_stopped(self, job: Job) -> bool:
        """Whether a trial ends here: it is among the weak ones at the rung of its latest validation."""
        own, start = self.histories.get(job.name, {}), compared_from(job.config)
        others = [
            each for name, each in self.histories.items() if name != job.name and not self.plans[name].repeats
        ]
        reason = "" if job.plan.repeats else reason_to_stop(self.settings, job.steps - start, own, others)
        if reason:
            last = max(own)
            details = {"step": start + last, "metrics": own[last], "reason": reason}
            self._keep(outcome_of(job.name, job.plan, "stopped", **details))
        return bool(reason)

    def ended(self, name: str, outcome: TrialOutcome) -> None:
        """A job's process has ended."""
        job = self.running.pop(name)
        if job.kind == "stage 1":
            if outcome.status == "finished" and not stage_one.is_trained(job.run, job.config.psnr.steps):
                outcome = replace(outcome, status="failed", reason="no last checkpoint", retry=True)
            if outcome.status == "failed":
                self._failed_stages[name] = outcome
            print(f"{name} {outcome.status}{_because(outcome.reason)}", flush=True)
            if outcome.status == "interrupted":
                self._again(job)
            return
        if name in self.outcomes:  # stopped early: written when it was decided
            kept = self.outcomes[name]
            outcome = replace(kept, run_id=sweep_folder.tracking_run_id(job.run), seconds=outcome.seconds)
        if outcome.status == "interrupted":
            step = max(0, published_step(job.run))
            print(f"{name} interrupted at step {step}/{job.steps}{_because(outcome.reason)}", flush=True)
            self._again(job)
            return
        outcome = replace(outcome, run_id=outcome.run_id or sweep_folder.tracking_run_id(job.run))
        self.histories[name] = self._history(name) or self.histories.get(name, {})
        self._keep(outcome)
        shown = shown_metrics(outcome.metrics, self.settings.metrics)
        count = sum(not each.repeats for each in self.outcomes.values())
        print(
            f"{name} {outcome.status} at step {outcome.step}/{job.steps}: {shown}{_because(outcome.reason)} "
            f"({count}/{self.total})",
            flush=True,
        )

    def _again(self, job: Job) -> None:
        """Lets an interrupted job start again, unless the sweep is stopping."""
        if not self.stopping:
            STOP.end(job.run)
            if job.kind == "trial":
                self._waiting.append(job.name)

    def lost(self, name: str, reason: str) -> None:
        """A job's process died more often than it is restarted. It resumes once more if it has made progress."""
        job = self.running[name]
        step, before = published_step(job.run), self._lost_at.get(name)
        self._lost_at[name] = step
        status = "interrupted" if before is None or step > before else "failed"
        self.ended(name, outcome_of(name, job.plan, status, reason=without_secrets(reason), retry=True))

    def stop(self) -> None:
        """Makes all running jobs save and stop; no further job is started."""
        self.stopping = True
        for job in self.running.values():
            STOP.make(job.run)

    def database(self) -> bytes:
        """The searched trials as Optuna's SQLite file."""
        return as_database(study(self.settings, self._searched(), self.outcomes, self.histories))

    def _fill(self) -> None:
        """Proposes trials for the free slots, and repetitions after the last one has ended."""
        active = sum(job.kind == "trial" for job in self.running.values())
        while not self._exhausted and active + len(self._waiting) < self.slots:
            searched = self._searched()
            if len(searched) >= self.total:
                break
            values = propose(self.settings, self.base, searched, self.outcomes, self.histories)
            if values is None:
                print(f"no other valid values are left after {len(searched)} trials", flush=True)
                self._exhausted = True
                break
            self._plan(values)
        searched = self._searched()
        complete = self._exhausted or len(searched) >= self.total
        if complete and all(trial_name(plan.values) in self.outcomes for plan in searched):
            self._repeat()

    def _repeat(self) -> None:
        ranking = compare_trials(self.settings, [each for each in self.outcomes.values() if not each.repeats])
        top = ranking.names()[: self.settings.repeat_top]
        for offset in range(1, self.settings.repeats + 1):
            for name in top:
                values = self.plans[name].values | {"seed": self.base.seed + offset}
                if trial_name(values) not in self.plans:
                    self._plan(values, repeats=name)

    def _plan(self, values: Values, repeats: str = "") -> None:
        number = 1 + max((plan.number for plan in self.plans.values()), default=-1)
        plan, name = TrialPlan(number, values, repeats), trial_name(values)
        TRIAL_PLAN.at(name=name).write(self.sweep, plan)
        self.plans[name] = plan
        self._waiting.append(name)

    def _searched(self) -> list[TrialPlan]:
        return [plan for plan in self.plans.values() if not plan.repeats]

    def job(self, name: str) -> Job:
        """The job of a trial that was proposed. Raises UserError: its values are invalid."""
        plan, own = self.plans[name], {"run_name": name, "storage": self.sweep.path("trials")}
        return Job(name, "trial", trial_config(self.base, plan.values | own), plan)

    def _history(self, name: str) -> dict[int, dict[str, float]]:
        """The trial's validations by step of the compared stage."""
        try:
            start = compared_from(self.job(name).config)
        except UserError:
            return {}
        measured = validations(self.sweep / f"trials/{name}")
        return {step - start: metrics for step, metrics in measured.items() if step > start}

    def _keep(self, outcome: TrialOutcome) -> None:
        OUTCOME.at(name=outcome.run_name).write(self.sweep, outcome)
        self.outcomes[outcome.run_name] = outcome
        try:
            self.sweep.write_bytes("study.db", self.database())
        except Exception as error:  # noqa: BLE001 - a copy: the trials' files are what counts
            logger.warning("study.db not written: %s", error)
        self._outside_faults = self._outside_faults + 1 if outcome.retry else 0
        if self._outside_faults > 1 and not self.stopping:  # the next trials would fail the same way
            self.failure = outcome.reason
            self.stop()


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
