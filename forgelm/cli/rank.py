"""`python -m forgelm.cli.rank`: one of several processes of a run. The launcher starts it."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time

from forgelm import stop
from forgelm.cli.main import complain
from forgelm.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_TRAINING_ERROR, ForgeError, RunError
from forgelm.log import set_up
from forgelm.start import Ranks, follow, own
from forgelm.world import join


def main() -> int:
    """Work on the plan that comes through stdin; returns the exit code."""
    rank = int(os.environ["RANK"])
    plan, sys.argv = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    set_up(plan.config.debug)
    stop.ends_with_this(silent=True)
    try:
        with stop.listening():
            world = join()
            if rank != 0:
                return follow(world)
            ranks = Ranks(world)
            try:
                own(plan, ranks)
            finally:
                ranks.tell(None)
    except ForgeError as error:
        if rank == 0:
            return complain(error)
        if isinstance(error, RunError):
            # What this rank alone may know; the launcher passes it on.
            print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        if rank == 0:
            raise
        import traceback

        traceback.print_exc()
        return EXIT_TRAINING_ERROR
    return EXIT_OK


def _die_with_parent(parent: int) -> None:
    """A rank whose launcher was killed must not go on in a directory that others may enter."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(EXIT_TRAINING_ERROR)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: process groups and worker threads may wait for the others.
    os._exit(code)
