"""What submitting says, for the commands that submit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgelm.cluster.submit import already, how_to_follow, submit
from forgelm.errors import EXIT_OK
from forgelm.log import say, set_up
from forgelm.resolve import Plan


def submit_all(plans: Sequence[Plan], launcher: dict[str, Any], wait: bool) -> int:
    """Submit the runs that need it; returns the exit code."""
    set_up()
    left: dict[str, Plan] = {}
    for plan in plans:
        reason = None if plan.extends else already(plan.paths)
        if reason is None:
            left[str(plan.paths.root)] = plan
        else:
            say(reason)
    if not left:
        return EXIT_OK
    made = submit(list(left.values()), launcher)
    say(how_to_follow(made))
    if not wait:
        return EXIT_OK
    from forgelm.cluster.watch import wait as wait_for

    return wait_for(made)
