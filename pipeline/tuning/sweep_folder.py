"""The files of a sweep folder, from which the sweep resumes; docs/run_folder.md lists them.

Ray Tune's own snapshot is not used for resuming: it lags behind, and it does not restore limits.
"""

from pipeline.errors import UserError
from pipeline.run_folder import OUTCOME, SWEEP, TRIAL_VALUES, InitialWeights, SweepIdentity, TrialOutcome
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.identity import learning_fields
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import Values


def claim(
    sweep: Storage, base: TrainConfig, settings: TuneConfig, initial: dict[str, InitialWeights] | None = None
) -> None:
    """Writes the sweep's identity, or checks that it is unchanged; `initial`: given weights. Raises UserError."""
    search = settings.model_dump(mode="json", include={"space", "metric", "mode"})
    fields = {f"tune.{name}": value for name, value in search.items()} | learning_fields(base)
    initial = initial or {}
    fields |= {f"init.{network}": weights.sha256 for network, weights in initial.items()}
    new = SweepIdentity(fields, initial)
    old = SWEEP.read(sweep)
    if old is None:
        SWEEP.write(sweep, new)
    elif old != new:
        names = sorted(old.fields | new.fields)
        changed = [name for name in names if old.fields.get(name) != new.fields.get(name)]
        raise UserError(
            f"tune.name={settings.name} is in use with other values of {', '.join(changed)}; choose another tune.name"
        )


def outcomes(sweep: Storage) -> list[TrialOutcome]:
    """The ended trials, sorted by name. Raises UserError if a file is corrupt."""
    names = [name.removesuffix(".json") for name in sweep.names("outcomes") if name.endswith(".json")]
    read = [OUTCOME.at(name=name).read(sweep) for name in names]
    return [outcome for outcome in read if outcome is not None]


def keep_outcome(sweep: Storage, outcome: TrialOutcome) -> None:
    """Writes the outcome of an ended trial."""
    OUTCOME.at(name=outcome.run_name).write(sweep, outcome)


def unfinished(sweep: Storage, ended: set[str]) -> list[Values]:
    """Values of the trials that started and are not in `ended` (run names)."""
    names = [name for name in sweep.names("trials") if name not in ended]
    read = [TRIAL_VALUES.at(name=name).read(sweep) for name in names]
    return [values for values in read if values is not None]
