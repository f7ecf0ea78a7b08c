"""What submitting says, for the commands that submit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgelm.cluster.submit import already, check, how_to_follow, submit
from forgelm.errors import EXIT_OK
from forgelm.log import say, set_up
from forgelm.resolve import Plan


def submit_all(plans: Sequence[Plan], launcher: dict[str, Any], wait: bool) -> int:
    """Submit the runs that need it; returns the exit code."""
    set_up()
    check(launcher, plans)
    reasons = already([plan.paths for plan in plans if not plan.extends])
    for reason in reasons.values():
        say(reason)
    # A sweep may name a run twice.
    left = {plan.paths: plan for plan in plans if plan.extends or plan.paths not in reasons}
    if not left:
        return EXIT_OK
    made = submit(list(left.values()), launcher)
    say(how_to_follow(made))
    if not wait:
        return EXIT_OK
    from forgelm.cluster.watch import wait as wait_for

    return wait_for(made)
