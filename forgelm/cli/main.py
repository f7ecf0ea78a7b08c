"""`forgelm`: picks the command. Imports nothing that takes time before it knows which."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module

from forgelm import __version__, stop
from forgelm.errors import (
    EXIT_CONFIG_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TRAINING_ERROR,
    ForgeError,
)
from forgelm.redact import redact

COMMANDS = {
    "train": "compose a config and run it (the default command)",
    "resume": "go on with runs, from the configs that they were sealed with",
    "drill": "prove that a config can be interrupted and ends with the same bytes",
    "evaluate": "evaluate a run's final model on its task's splits",
    "predict": "apply a run's final model to own rows, written as a file",
    "export": "make a run's final model whole (--merge), or put it on the hub (--push)",
    "cache": "bring all that a run or sweep will need into the caches, every byte checked",
    "cache-models": "bring models from the hub into its cache, every byte checked",
    "cache-tasks": "bring the data of lm-eval's tasks into the caches, proved to load offline",
    "bundle": "pack the caches into one archive, to be carried where there is no network",
    "verify": "check a bundle, or what was unpacked of it, against its manifest",
    "import": "check a bundle, and merge it into this machine's caches",
    "doctor": "is this machine able to do this, and with overrides: this run",
    "verify-audit": "check that an audit log is as it was written",
}

_STOPPABLE = ("train", "resume")
_SEE_SWITCHES = ("cache", "cache-models", "cache-tasks", "doctor")
"""Commands that judge the switches for working offline as they were set."""

_HELP = """\
usage: forgelm COMMAND ...
       forgelm [OVERRIDES]            the same as forgelm train [OVERRIDES]

commands:
{commands}

forgelm train takes Hydra's overrides and flags:
  forgelm                             this help
  forgelm train                       the default run: embedded data, tiny model, no network
  forgelm mode=kd model=distilbert task=mnli
  forgelm train -m mode=sft,kd seed=1,2,3
  forgelm train --cfg job             print the composed config
  forgelm train hydra/launcher=slurm  submit it to Slurm; a sweep as one array
  forgelm train --help                the groups and keys

groups: task, model, teacher, mode, experiment
options: -h, --help    --version
completion: eval "$(forgelm -sc install=bash)"
"""


def entry() -> None:
    """The console script."""
    _open_streams()
    stop.ends_with_this()
    sys.exit(main(sys.argv[1:]))


def _open_streams() -> None:
    """Give a stream that the caller closed (`2>&-`) a place to go, and its descriptor with it.

    Else the next file that is opened gets the descriptor, and what children say is written there.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<18}{text}" for name, text in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)), end="")
        return EXIT_OK
    if argv[0] == "--version":
        print(f"forgelm {__version__}")
        return EXIT_OK
    name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("train", argv)
    if name == "train" and rest is argv and not _for_hydra(argv[0]):
        return _unknown(argv[0])
    if name not in _SEE_SWITCHES:
        from forgelm.hubcache import stay_offline

        stay_offline()
    try:
        # Before anything that takes time: a signal that comes first asks for a stop like any other.
        with stop.listening() if name in _STOPPABLE else nullcontext():
            command: Callable[[Sequence[str]], int] = import_module(_module(name)).main
            return command(rest)
    except ForgeError as error:
        return complain(error)
    except KeyboardInterrupt as stopped:
        print(f"forgelm: stopped by {str(stopped) or 'Ctrl-C'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        return crash(error, debug="debug=true" in argv or "--debug" in argv)


def _module(name: str) -> str:
    """A command's module; `import` is a word of Python's own."""
    return f"forgelm.cli.{'import_' if name == 'import' else name.replace('-', '_')}"


def complain(error: ForgeError) -> int:
    """Say an error on stderr, a line for each problem; returns its exit code."""
    for line in redact(str(error)).splitlines():
        print(f"forgelm: {line}", file=sys.stderr)
    return error.exit_code


def crash(error: Exception, debug: bool) -> int:
    """Say an error that nobody foresaw (a full disk, a bug) in one line; returns the exit code."""
    if debug:
        import traceback

        traceback.print_exception(error)
    text = redact(" ".join(str(error).split())[:500])
    print(f"forgelm: {type(error).__name__}: {text}; debug=true shows where", file=sys.stderr)
    return EXIT_TRAINING_ERROR


def _for_hydra(word: str) -> bool:
    return "=" in word or word.startswith(("-", "+", "~"))


def _unknown(word: str) -> int:
    import difflib

    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(
        f"forgelm: {redact(word)}: no such command; one of {', '.join(COMMANDS)}, "
        f"or an override such as mode=kd{hint}",
        file=sys.stderr,
    )
    return EXIT_CONFIG_ERROR
