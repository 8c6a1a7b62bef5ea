"""Every file of a run folder and of a sweep folder: its path and its type.

`docs/run_folder.md` is generated from this module: `python -m pipeline.run_folder > docs/run_folder.md`. It is longer
than 300 lines so that all files stay in one table.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.json_file import JsonFile


@dataclass(frozen=True)
class InitialWeights:
    """Given weights that a network starts from; `initial/NETWORK.safetensors` is a copy of them."""

    source: str
    """The value of init.generator or init.discriminator."""
    sha256: str
    """Over the bytes of the tensors in float32, names sorted."""
    residual_scale: float | None = None
    """The generator's, if its file has it."""
    version: str = ""
    """models:/NAME/VERSION, for a registered model."""
    model_id: str = ""
    """MLflow's id of its logged model."""
    run_id: str = ""
    """MLflow's id of the run that made it."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal when a run is resumed, unless the user accepts the change."""

    key: str
    """Random; the tag by which the run is found in MLflow."""
    fields: dict[str, Any]
    """Values of the configuration fields that decide what is learned."""
    manifest_sha256: str
    """Digest of the data set's manifest."""
    tracking_run_id: str | None = None
    """MLflow's run id."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that may change the result."""
    initial: dict[str, InitialWeights] = field(default_factory=dict)
    """Initial weights of `generator` and `discriminator`, if given."""


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished run."""

    run_name: str
    run_id: str | None
    """MLflow's run id."""
    stage: str
    step: int
    """Optimizer steps over both stages."""
    generator_sha256: str
    """Over the bytes of the EMA weights, names sorted."""
    checkpoint: str
    model_version: int | None
    metrics: dict[str, float]
    """Validation metrics of the registered generator."""
    final_metrics: dict[str, float]
    """Validation metrics of the EMA weights at `step`."""
    bicubic_metrics: dict[str, float] = field(default_factory=dict)
    """The same metrics of bicubic upscaling."""


FaultKind = Literal["died", "error", "diverged"]


@dataclass(frozen=True)
class Fault:
    """One failure of the worker group."""

    step: int
    """Step of the newest checkpoint at that time; -1 without one."""
    kind: FaultKind
    """A worker process died, training raised an error, or gradients stayed non-finite."""
    text: str
    time_ms: int


@dataclass(frozen=True)
class WorkerGroup:
    """The latest worker group: compared with the next one to log why it was started."""

    faults: int
    """Faults recorded when it started."""
    workers: int


@dataclass(frozen=True)
class Refusal:
    """Why a worker stopped for good: the message of its UserError, raised again by the driver."""

    message: str
    storage_full: bool = False
    """Whether storage could not be written: the same command resumes once it can."""


@dataclass(frozen=True)
class FileDigest:
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Digests of a checkpoint's files; a checkpoint without it is incomplete."""

    format: int
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class TrackingDescription:
    """All that is needed to open the run in MLflow at any later time; no secrets."""

    experiment: str
    uri: str
    run_name: str
    parameters: dict[str, str]
    tags: dict[str, str]
    config_text: str
    parent_run_id: str | None = None
    run_id: str | None = None
    status: str = "RUNNING"
    reason: str = ""
    """Why the run failed; empty otherwise."""
    started_ms: int | None = None
    """When it was first submitted, in milliseconds since 1970."""
    ended_ms: int | None = None


@dataclass(frozen=True)
class SentMark:
    """The last segment of metrics that MLflow has."""

    run_id: str
    step: int


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator's file, and what it achieved."""

    file: str
    """Its .safetensors file, below the run's folder."""
    sha256: str
    """Of the file."""
    step: int
    metrics: dict[str, float]
    """Validation metrics."""


@dataclass(frozen=True)
class CandidateDescription:
    """The generator that waits to be registered."""

    model_name: str
    metric: str
    """The metric that chose it, such as psnr_y or Set14/lpips; compared with the champion's."""
    generator: TrainedGenerator
    earlier: list[TrainedGenerator]
    """Results of earlier stages: logged with their metrics, not registered."""
    evaluation_set: str
    """Digest of the images that the metrics were measured on."""
    config_text: str
    """The whole configuration, as YAML."""
    data_sha256: str
    """Digest of the data set's manifest."""
    data: str = ""
    """The images that the manifest lists, in a few words."""
    license: str = ""
    """Note on the license of the training images, and so of the weights."""
    images: list[str] = field(default_factory=list)
    """Titles of the model card's images, in the order of their files."""
    initial: dict[str, str] = field(default_factory=dict)
    """Source and digest of the initial weights, as in the model card; empty: random."""
    bicubic: dict[str, float] = field(default_factory=dict)
    """Validation metrics of bicubic upscaling."""


@dataclass(frozen=True)
class SweepIdentity:
    """What must be equal when a sweep is resumed."""

    fields: dict[str, Any]
    """The search space, the objectives, and the fields that decide what a trial learns and is measured on."""
    manifest_sha256: str = ""
    """Digest of the data set's manifest."""
    initial: dict[str, InitialWeights] = field(default_factory=dict, compare=False)
    """Initial weights of the trials, if given; `fields` has their digests."""


@dataclass(frozen=True)
class TrialPlan:
    """What a trial is to train."""

    number: int
    """Trials are numbered in the order in which they were proposed."""
    values: dict[str, Any]
    """The searched fields; a repetition also has its seed."""
    repeats: str = ""
    """Name of the trial that this one repeats with another seed."""


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended."""

    run_name: str
    run_id: str | None
    """MLflow's run id."""
    values: dict[str, Any]
    """The searched fields."""
    status: str
    """finished, stopped (early, by the scheduler) or failed."""
    step: int
    """Step of `metrics`: the one that tune.value chooses, or the last validation before the trial ended."""
    metrics: dict[str, float]
    """Validation of the EMA weights at `step`; the mean of several with tune.value=mean."""
    reason: str = ""
    """Why it was stopped or failed."""
    number: int = 0
    repeats: str = ""
    """Name of the trial that this one repeats with another seed."""
    seconds: float = 0.0
    """Wall-clock time of its last attempt."""
    retry: bool = False
    """Whether the reason is outside the trial (a lost process, a full disk): the next submission resumes it."""


IDENTITY: JsonFile[RunIdentity] = JsonFile(
    "run.json", RunIdentity, "Run identity.", "restore it or choose another run_name"
)
RESULT: JsonFile[TrainingResult] = JsonFile(
    "result.json", TrainingResult, "Written when the run has finished."
)
FAULTS: JsonFile[list[Fault]] = JsonFile(
    "faults.json", list[Fault], "Failures of worker groups since the run was last submitted."
)
GROUP: JsonFile[WorkerGroup] = JsonFile("group.json", WorkerGroup, "The latest worker group.")
REFUSAL: JsonFile[Refusal] = JsonFile(
    "refusal.json", Refusal, "Why a worker refused to continue; removed at the next submission."
)
CHECKPOINT_MANIFEST: JsonFile[CheckpointManifest] = JsonFile(
    "checkpoints/{name}/manifest.json", CheckpointManifest, "Written last: the checkpoint is complete."
)
CHECKPOINT_STATE: JsonFile[dict[str, Any]] = JsonFile(
    "checkpoints/{name}/state.json",
    dict[str, Any],
    "Stage, step, best validations, latest metrics, counters.",
)
MLFLOW_RUN: JsonFile[TrackingDescription] = JsonFile(
    "tracking/mlflow.json", TrackingDescription, "The MLflow run and what is logged when it is opened.",
    "start the training again with this run name",
)  # fmt: skip
SENT: JsonFile[SentMark] = JsonFile("tracking/sent.json", SentMark, "The last segment that was sent.")
CANDIDATE: JsonFile[CandidateDescription] = JsonFile(
    "tracking/candidate/candidate.json", CandidateDescription, "The generator to be registered; removed afterwards.",
    "start the training again with this run name",
)  # fmt: skip
SWEEP: JsonFile[SweepIdentity] = JsonFile(
    "sweep.json", SweepIdentity, "Sweep identity.", "restore it or choose another tune.name"
)
TRIAL_PLAN: JsonFile[TrialPlan] = JsonFile(
    "trials/{name}/trial.json", TrialPlan, "A trial's searched fields, written when it is proposed."
)
OUTCOME: JsonFile[TrialOutcome] = JsonFile(
    "outcomes/{name}.json", TrialOutcome, "One for each trial that ended.", "remove it to run the trial again"
)

JSON_FILES = [value for value in globals().values() if isinstance(value, JsonFile)]
OTHER_FILES = {
    "config.yaml": "The whole configuration of the latest submission, without secrets.",
    "initial/{network}.safetensors": "Copy of given initial weights; `generator` or `discriminator`.",
    ".lock": "Locked by the process that trains the run (not in an object store).",
    "stop": "Present while a graceful stop is requested.",
    "save": "Present while a checkpoint is requested before an elastic worker group is resized.",
    "checkpoints/{name}/generator.safetensors": "EMA weights with the architecture in the metadata: a model file.",
    "checkpoints/{name}/training.safetensors": "Networks, optimizers, counters.",
    "tracking/{step}.jsonl": "A segment: metrics, images and events up to the checkpoint of this step.",
    "tracking/{step}/*.png": "The segment's images.",
    "tracking/candidate/*.png": "Images of the model card.",
    "ray/": "Ray Train's own files; nothing is read from them.",
    "log.txt": "What a trial printed.",
    "stage1/": "A sweep's runs of stage 1, each shared by the trials that differ in stage 2 only.",
    "tradeoff.png": "A sweep's figure: every searched field against every metric.",
    "report.html": "A sweep's report.",
    "best.yaml": "The best trial's values, as a configuration for `train_gan.py`.",
    "study.db": "A copy of a sweep's trials for optuna-dashboard; nothing is read from it.",
}


def page() -> str:
    """All files as a Markdown page."""
    lines = [
        "# Files of a run folder and of a sweep folder",
        "",
        "A run is a folder `STORAGE/RUN_NAME/`, a sweep `STORAGE/TUNE_NAME/` with its trials' runs in `trials/`.",
        "Every file is written atomically. A corrupt file is refused with one line that names the remedy, or *ignored*",
        "with a warning in the log: it counts as missing. This page is generated from `pipeline/run_folder.py`.",
        "",
        "| file | purpose | fields | if corrupt |",
        "|---|---|---|---|",
    ]
    for file in JSON_FILES:
        item = file.type.__args__[0] if getattr(file.type, "__origin__", None) is list else file.type
        fields = (
            [f"`{each.name}`" for each in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []
        )
        lines.append(
            f"| `{file.path}` | {file.purpose} | {', '.join(fields) or 'any'} | {file.remedy or '*ignored*'} |"
        )
    lines += [f"| `{path}` | {purpose} | | |" for path, purpose in OTHER_FILES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
