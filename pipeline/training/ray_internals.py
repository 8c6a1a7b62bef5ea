"""All uses of Ray's internals in training; checked against Ray 2.60."""

import logging

import ray
from ray._private.state import state as cluster_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution import context as reports
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

__all__ = ["ENV_VARS_TO_PROPAGATE", "PlacementGroupCleanup", "remove_orphaned_placement_groups", "reports"]

logger = logging.getLogger(__name__)


def remove_orphaned_placement_groups(of_actor: str | None = None) -> None:
    """Removes this Ray job's placement groups whose creator is a dead actor; their CPUs and GPUs become free.

    Ray keeps such a group until the whole job ends. Ray Train's own cleaner removes it only for a controller that died
    after its worker group had started. Groups of live actors, as other trials' controllers are, stay.

    Args:
        of_actor: id of a live actor whose groups are removed as well.
    """
    job = ray.get_runtime_context().get_job_id()
    for data in cluster_state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        creator = ray.ActorID(group.creator_actor_id)
        # A driver's groups have no creator, and Ray marks that one as dead.
        if creator.is_nil() or group.is_detached or group.creator_job_id.hex() != job:
            continue
        orphaned = group.creator_actor_dead or creator.hex() == of_actor
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            logger.warning("removing the placement group of Ray Train controller %s", creator.hex())
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


class PlacementGroupCleanup(WorkerGroupCallback, ControllerCallback):
    """Removes what a worker group that failed while starting leaves behind; runs in Ray Train's controller.

    When a callback or a worker fails after the workers' processes have started (while they join their process group,
    for instance), Ray Train forgets the group without removing its placement group. The next one, of this controller
    or of its successor, would wait for its own CPUs.
    """

    def before_worker_group_start(self, worker_group_context: object) -> None:
        """No worker group of this controller is alive here."""
        self._remove()

    async def before_controller_shutdown(self) -> None:
        """The worker group has been shut down, if the controller knows one."""
        self._remove()

    def _remove(self) -> None:
        remove_orphaned_placement_groups(of_actor=ray.get_runtime_context().get_actor_id())
