"""The end of a run: registers the best generator and writes the result."""

import json
from collections.abc import Sequence
from contextlib import suppress

from pipeline.data import Manifest
from pipeline.errors import UserError
from pipeline.model.weights import generator_sha256
from pipeline.run_folder import IDENTITY, RESULT, CandidateDescription, TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate, trained_generator
from pipeline.tracking.model_card import license_note
from pipeline.tracking.registry import register_candidate
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.spool import images_at
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.training.selection import select_key
from pipeline.training.state import best_of, of_metric
from pipeline.training.validation_config import HELD_OUT
from pipeline.training.validation_sets import ValidationSet, deciding_images
from pipeline.training.validator import comparison, is_below


def conclude(
    config: TrainConfig,
    run: Storage,
    tracked: TrackedRun | None,
    text: str,
    manifest: Manifest,
    sets: Sequence[ValidationSet],
) -> TrainingResult:
    """Registers the best generator and writes the result; a generator that cannot be registered is kept in the run."""
    final = checkpoints.newest(run)
    last = config.psnr.steps + config.gan.steps
    if final is None or final.name.step != last:
        raise RuntimeError(f"{run.uri}: training ended, but the last checkpoint is not that of step {last}")
    images = deciding_images(config, sets) or manifest.held_out_sha256
    chosen = _best(config, run, final, images)
    version = None
    if config.tracking.register_model:
        candidate = _candidate(config, run, chosen, text, manifest, images)
        candidate.save(run)
        try:
            if tracked is None:
                raise UserError(
                    f"registering {config.tracking.model_name}: the tracking server is unreachable"
                )
            registered = register_candidate(tracked, candidate)
            version = registered.version
            print(f"registered {registered.name} version {version}: {registered.reason}", flush=True)
        except UserError as error:
            if config.tracking.enabled:
                print(f"{error}; no data was lost; {send_later(run)}", flush=True)
            else:
                print(
                    "tracking is disabled: to send the metrics and register the generator later, run: python "
                    f"jobs/send_metrics.py --run {run.uri} [--tracking.uri URI]",
                    flush=True,
                )
    result = TrainingResult(
        run_name=config.run_name,
        run_id=tracked.run_id if tracked else None,
        stage=final.name.stage,
        step=final.name.step,
        generator_sha256=generator_sha256(final.ema),
        checkpoint=run.path(final.name.folder),
        model_version=version,
        metrics=chosen.scalars["metrics"],
        final_metrics=final.scalars["metrics"],
        bicubic_metrics=final.scalars["bicubic"],
    )
    RESULT.write(run, result)
    if version is not None:
        Candidate.discard(run)
    return result


def result_lines(result: TrainingResult, model: str | None) -> list[str]:
    """The last lines of a run: its checkpoint, and the registered model with its metrics next to bicubic's.

    `model`: the registered version, models:/NAME/VERSION; None if nothing was registered.
    """
    metrics = comparison(result.metrics, result.bicubic_metrics) or "not validated"
    lines = [
        f"run {result.run_name}: step {result.step} of stage {result.stage}",
        f"checkpoint: {result.checkpoint}",
        f"{f'registered: {model}' if model else 'not registered'}: {metrics}",
    ]
    if is_below(result.metrics, result.bicubic_metrics):
        lines.append(
            "warning: PSNR (Y) is below bicubic's; train longer, or from trained weights: docs/finetune.md"
        )
    return lines


def send_later(run: Storage) -> str:
    """The command that uploads what MLflow lacks, for a log line."""
    return f"once the server is back, run: python jobs/send_metrics.py --run {run.uri}"


def _best(
    config: TrainConfig, run: Storage, final: checkpoints.Checkpoint, images: str
) -> checkpoints.Checkpoint:
    """The best readable checkpoint of the last stage; the last one if there was no validation."""
    for best in of_metric(best_of(final.scalars), select_key(config, final.name.stage), images):
        if best.step == final.name.step:
            return final
        try:
            return checkpoints.read(run, checkpoints.CheckpointName(best.step, final.name.stage))
        except checkpoints.CorruptCheckpoint as error:
            print(
                f"the best checkpoint, of step {best.step}, is unreadable ({error}); using the next best",
                flush=True,
            )
    return final


def _candidate(
    config: TrainConfig,
    run: Storage,
    chosen: checkpoints.Checkpoint,
    text: str,
    manifest: Manifest,
    evaluation_set: str,
) -> Candidate:
    """What is to be registered: the chosen generator, and stage 1's result for comparison."""
    generators = [chosen]
    stage_one = checkpoints.CheckpointName(config.psnr.steps, "psnr")
    if chosen.name.stage == "gan" and stage_one in checkpoints.listed(run):
        with suppress(checkpoints.CorruptCheckpoint):
            generators.insert(0, checkpoints.read(run, stage_one))
    *earlier, best = [
        trained_generator(
            run, f"{each.name.folder}/generator.safetensors", each.name.step, each.scalars["metrics"]
        )
        for each in generators
    ]
    images = {
        key.removeprefix("validation/"): strip
        for key, strip in images_at(run, best.step).items()
        if key.startswith("validation/") and _is_deciding(config, key.removeprefix("validation/"))
    }
    description = CandidateDescription(
        model_name=config.tracking.model_name,
        metric=select_key(config, chosen.name.stage),
        generator=best,
        earlier=earlier,
        evaluation_set=evaluation_set,
        config_text=text,
        data_sha256=manifest.sha256,
        data=manifest.facts()["source"],
        license=license_note(json.loads(manifest.content).get("licenses", {})),
        initial=_initial_facts(run),
        bicubic=chosen.scalars["bicubic"],
    )
    return Candidate(description, images)


def _is_deciding(config: TrainConfig, image: str) -> bool:
    """Whether a validation image is one of `validation.select_on`."""
    first = image.partition("/")[0]
    return (first if first in config.validation.sets else HELD_OUT) == config.validation.select_on


def _initial_facts(run: Storage) -> dict[str, str]:
    """The given initial weights, for the model card."""
    identity = IDENTITY.read(run)
    facts = {}
    for network, weights in identity.initial.items() if identity else ():
        facts[f"initial_{network}"] = weights.version or weights.source
        facts[f"initial_{network}_sha256"] = weights.sha256
    return facts
