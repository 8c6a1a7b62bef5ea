"""What is printed every few minutes while a sweep runs."""

from pipeline.tracking.spool import published_step
from pipeline.tuning.trial_queue import TrialQueue


def status_lines(queue: TrialQueue, elapsed_s: float) -> list[str]:
    """How many trials have ended, how long the others will take, and a line for each running job.

    `elapsed_s`: seconds since this submission began.
    """
    steps = {name: max(queue.steps[name], published_step(job.run)) for name, job in queue.running.items()}
    lines = []
    for name, job in sorted(queue.running.items()):
        history = queue.histories.get(name, {})
        last = history[max(history)] if history else {}
        values = [f"{metric} {last[metric]:.4f}" for metric in queue.settings.metrics if metric in last]
        lines.append("  ".join([f"  {name}", f"step {steps[name]}/{job.steps}", *values]))
    trained = sum((queue.steps | steps)[name] - first for name, first in queue.first_steps.items())
    ended = sum(not each.repeats for each in queue.outcomes.values())
    active = sum(job.kind == "trial" for job in queue.running.values())
    base = queue.base
    each_steps = base.gan.steps if queue.is_shared and base.gan.steps else base.psnr.steps + base.gan.steps
    left = sum(job.steps - steps[name] for name, job in queue.running.items())
    left += max(0, queue.total - ended - active) * each_steps
    text = f"{ended} of {queue.total} trials ended"
    if trained > 0:
        text += f"; about {max(1, round(left * elapsed_s / trained / 60))} min left"
    return [text, *lines]
