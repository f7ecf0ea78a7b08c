"""What submitting says, for the commands that submit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from forgelm.cluster.jobs import already
from forgelm.cluster.launchers import check
from forgelm.cluster.submit import Submission, forget_teachers, how_to_follow, submit
from forgelm.errors import EXIT_OK, ForgeError
from forgelm.log import say, set_up
from forgelm.resolve import Plan


def submit_all(plans: Sequence[Plan], launcher: dict[str, Any], wait: bool) -> int:
    """Submit the runs that need it; returns the exit code."""
    set_up()
    try:
        check(launcher, plans)
        reasons, queued = already(plans)
        for reason in reasons.values():
            say(reason)
        # A sweep may name a run twice.
        left = {plan.paths: plan for plan in plans if plan.paths not in reasons}
        made = submit(list(left.values()), launcher) if left else None
    except ForgeError:
        forget_teachers(plans)
        raise
    if made is not None:
        say(how_to_follow(made))
    if not wait or not (left or queued):
        return EXIT_OK
    from forgelm.cluster.watch import wait as wait_for

    return wait_for(_with(made, queued))


def _with(made: Submission | None, queued: dict[Any, str]) -> Submission:
    """What was submitted now, and what was before."""
    names, runs = [*queued.values()], [*queued]
    if made is None:
        return Submission(runs[0].root, names[0].partition("_")[0], names, runs)
    return replace(made, names=[*made.names, *names], runs=[*made.runs, *runs])
