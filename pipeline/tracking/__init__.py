"""MLflow: the run, the spool and its sender, the registry.

`pipeline.tracking.records` and `.config` import without MLflow: training's loop needs no more. The names below come
with it, which takes seconds, when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tracking.runs import TrackedRun, finish_run, open_parent, open_run, require_store
    from pipeline.tracking.sender import Sender

__all__ = ["Sender", "TrackedRun", "finish_run", "open_parent", "open_run", "require_store"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.tracking import runs, sender

    return sender.Sender if name == "Sender" else getattr(runs, name)
