"""Interrupting a run at a chosen point, as a scheduler or a power cut might: how safety is proved.

`FORGELM_INTERRUPT=save:2:SIGKILL` sends the process SIGKILL when it comes to the point `save` for
the second time, `save:2:SIGKILL:1` the second of several ranks alone. Nothing else happens at a
point; without the variable nothing does.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "FORGELM_INTERRUPT"
POINTS = (
    "preparation",
    "evaluation_before",
    "lm_eval_before",
    "training",
    "generation",
    "evaluation",
    "save",
    "lm_eval",
    "finalize",
)

_seen: Counter[str] = Counter()


def point(name: str) -> None:
    """Come to a point; `name` is one of POINTS."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    where, count, sent, *rank = wanted.split(":")
    if rank and os.environ.get("RANK") != rank[0]:
        return
    _seen[name] += 1
    if where == name and _seen[name] == int(count):
        os.kill(os.getpid(), signal.Signals[sent])
