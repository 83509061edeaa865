"""exit_step: `exit_head` whose last program also orders the survivors."""

from .exit_head import Head, Out, Plan, Scratch, exit_head, plan


def exit_step(head: Head, how: Plan, measure: int, threshold: float, out: Out, scratch: Scratch, tuning) -> None:
    """Run a head, its rule and the compaction: `Plan.launches`, one unless pooling has its own."""
    if head.shape[0] == 0:
        out.count.zero_()
    exit_head(head, how, measure, threshold, False, out, scratch, tuning)


__all__ = ["exit_step", "plan"]
