"""Every error that forgelm raises on purpose, and the exit codes of its commands.

    ForgeError
    ├── ConfigError     the request is wrong                          EXIT_CONFIG_ERROR
    ├── RunError        it failed while running                       EXIT_TRAINING_ERROR
    ├── RunInUse        another process is in the run directory       EXIT_CONFIG_ERROR
    ├── Stopped         stopped safely, to be gone on with            EXIT_STOPPED
    └── RankFailed      a process of several ended so; it said why    the code of that process

A message names the thing, the value given, what would be right and what to do, on one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_CONFIG_ERROR = 1
EXIT_TRAINING_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

_BY_SEVERITY = (
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_CONFIG_ERROR,
    EXIT_TRAINING_ERROR,
    EXIT_INTERRUPTED,
)


class ForgeError(Exception):
    """Base of all; `exit_code` is what the command ends with."""

    exit_code = EXIT_TRAINING_ERROR


class ConfigError(ForgeError):
    """The request is wrong. Carries all problems found, one line each."""

    exit_code = EXIT_CONFIG_ERROR

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(ForgeError):
    """It failed while running: network, disk, a crash, a loss that is not a number."""


class RunInUse(ForgeError):
    """Another process holds the run directory."""

    exit_code = EXIT_CONFIG_ERROR


class Stopped(ForgeError):
    """Somebody asked the run to stop, and it did, with everything saved."""

    exit_code = EXIT_STOPPED


class RankFailed(ForgeError):
    """One of the processes that ran a run together ended with this code and said why itself."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("")


def in_brief(text: str, width: int = 300) -> str:
    """What somebody else said, on one line, cut between words."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return f"{line[: width + 1].rpartition(' ')[0] or line[:width]} ..."


def worst(codes: Iterable[int]) -> int:
    """The exit code of a sweep or batch: the worst of its parts.

    An unknown code (a signal's, say) counts as a failure while running.
    """
    known = [code if code in _BY_SEVERITY else EXIT_TRAINING_ERROR for code in codes]
    return max(known, key=_BY_SEVERITY.index, default=EXIT_OK)
