"""All uses of Ray's internals in training; checked against Ray 2.60, the upper bound in pyproject.toml."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution import context as reports
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.run_folder import REFUSAL
from pipeline.storage import Storage
from pipeline.training.stopping import SAVE

__all__ = [
    "CheckedTorchConfig",
    "PlacementGroupCleanup",
    "PreemptionNotice",
    "SavingTrainer",
    "WorkerGroupCallback",
    "cause_of",
    "remove_orphaned_placement_groups",
    "reports",
]

logger = logging.getLogger(__name__)


def remove_orphaned_placement_groups(of_actor: str | None = None) -> None:
    """Removes this Ray job's placement groups whose creator is a dead actor, which frees their CPUs and GPUs.

    Ray keeps such a group until the whole job ends. Groups of live actors (such as other trials' controllers) are kept.

    Args:
        of_actor: id of a live actor whose groups are removed as well.
    """
    job = ray.get_runtime_context().get_job_id()
    for data in cluster_state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        creator = ray.ActorID(group.creator_actor_id)
        # A driver's groups have no creator, which Ray marks as dead.
        if creator.is_nil() or group.is_detached or group.creator_job_id.hex() != job:
            continue
        orphaned = group.creator_actor_dead or creator.hex() == of_actor
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            logger.warning("removing the placement group of Ray Train controller %s", creator.hex())
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def cause_of(error: BaseException) -> BaseException:
    """The exception that training raised, without Ray Train's wrapper."""
    return getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error


class PlacementGroupCleanup(WorkerGroupCallback, ControllerCallback):
    """Removes the placement group of a worker group that failed while starting; runs in Ray Train's controller.

    When a callback or a worker fails after the worker processes have started (while they join their process group, for
    instance), Ray Train drops the group without removing its placement group. The next group, of this controller or of
    its successor, would wait for those CPUs.
    """

    def before_worker_group_start(self, worker_group_context: object) -> None:
        """No worker group of this controller is alive at this time."""
        self._remove()

    async def before_controller_shutdown(self) -> None:
        """The worker group, if there is one, has been shut down."""
        self._remove()

    def _remove(self) -> None:
        remove_orphaned_placement_groups(of_actor=ray.get_runtime_context().get_actor_id())


class PreemptionNotice(WorkerGroupCallback):
    """Ray's watcher of nodes that are about to be preempted, as a thread of Ray Train's controller.

    Ray starts it as a separate process (RAY_TRAIN_ENABLE_PREEMPTION_WATCHER) while the workers start, which delays
    them by 2 s on two cores.
    """

    def __init__(self) -> None:
        self._watcher: PreemptionWatcher | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watches the nodes of this group's workers."""
        self._end()  # a group that failed while starting has no other hook
        ranks: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        self._watcher = PreemptionWatcher(ranks, worker_actors_by_rank=actors)

    def before_worker_group_shutdown(self, worker_group: object) -> None:
        """The group ends."""
        self._end()

    def after_worker_group_abort(self, worker_group_context: object) -> None:
        """The group was ended."""
        self._end()

    def _end(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


@dataclass(kw_only=True)
class CheckedTorchConfig(TorchConfig):
    """A TorchConfig that calls a function on every worker before they join their process group."""

    prepare_worker: Callable[[], str]
    """Returns why its worker cannot train; empty if it can."""
    refuse: Callable[[str], None]
    """Called in the controller with the first reason; raises."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The class that starts the process group."""
        return _CheckedBackend


class _CheckedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        for reason in worker_group.execute(_called, backend_config.prepare_worker):
            if reason:
                backend_config.refuse(reason)
        super().on_start(worker_group, backend_config)


def _called(function: Callable[[], str]) -> str:
    """Ray names its tasks by the function's name, which a partial lacks."""
    return function()


class _EndAtRefusal(DefaultFailurePolicy):
    """Ray's policy, which retries, except that a worker's refusal ends the run."""

    def __init__(self, failure_config: Any, run: Storage) -> None:
        super().__init__(failure_config)
        self._run = run

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if REFUSAL.read(self._run) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class SavingTrainer(TorchTrainer):
    """A TorchTrainer that a refusal ends, and whose elastic worker group saves a checkpoint before it is resized."""

    def __init__(self, *arguments: Any, run: Storage, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._run = run

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's, without those that start a process for what this package does itself.

        One distributes Ray data sets to workers, the other removes the placement groups of dead controllers. A
        worker group starts 2 s later with them, on two cores.
        """
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        controller["failure_policy"] = _EndAtRefusal(self.run_config.failure_config, self._run)
        if self.scaling_config.elasticity_enabled:
            controller["scaling_policy"] = _SaveFirst(self.scaling_config, self._run)
        return super()._initialize_and_run_controller(**controller)


class _SaveFirst(ElasticScalingPolicy):
    """Ray's elastic policy, which resizes a running worker group only after it has saved a checkpoint.

    Ray's own policy ends the group at once, and all steps since the newest checkpoint are lost. While it waits for the
    checkpoint, the controller keeps polling the workers; if one dies, the request is withdrawn.
    """

    def __init__(self, scaling_config: Any, run: Storage) -> None:
        super().__init__(scaling_config)
        self._run, self._requested = run, False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._requested:
            self._requested = False
            SAVE.end(self._run)
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, *status: Any, **named: Any) -> ScalingDecision:
        if self._requested and self._is_pending():
            self._maybe_send_resource_request()
            return NoopDecision()
        saved, self._requested = self._requested, False
        if saved:
            # Decide now, from the current nodes; Ray's policy would only look once per interval.
            self._latest_monitor_time = float("-inf")
        decision = super().make_decision_for_running_worker_group(*status, **named)
        if saved or not isinstance(decision, ResizeDecision):
            return decision
        with suppress(OSError):  # storage cannot be written: retried at the next interval
            SAVE.make(self._run)
            self._requested = True
            print(f"saving a checkpoint before resizing to {decision.num_workers} workers", flush=True)
        return NoopDecision()

    def _is_pending(self) -> bool:
        try:
            return SAVE.is_open(self._run)
        except OSError:
            return True
