"""`forgelm resume RUN...`: go on with runs from the configs that they were sealed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgelm.cli.main import complain, crash
from forgelm.errors import EXIT_OK, ConfigError, ForgeError, RunInUse, worst

_HELP = """\
usage: forgelm resume RUN... [OVERRIDES]
       forgelm resume --incomplete [OVERRIDES]

RUN is a run directory, a run id, or a name that only one run has. Runs go on from the configs that
they were sealed with; max_steps=N and epochs=N extend them, nothing else of them can be changed.

  --incomplete   all runs that are registered as incomplete, cancelled ones excepted
  --local        here, whatever launched them first

  forgelm resume outputs/mnli/distilbert/kd/2f1c9a7be0
  forgelm resume 2f1c9a7be0 max_steps=20000
  forgelm resume --incomplete output_root=/scratch/me/outputs
"""
_FLAGS = ("--incomplete", "--local")


def main(argv: Sequence[str]) -> int:
    """Go on with each run in turn; returns the worst of their exit codes."""
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return EXIT_OK
    overrides = [word for word in argv if "=" in word and not Path(word).is_dir()]
    flags = [word for word in argv if word.startswith("-")]
    runs = [word for word in argv if word not in overrides and word not in flags]
    unknown = [flag for flag in flags if flag not in _FLAGS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option; one of {', '.join(_FLAGS)}")
    if "--incomplete" in flags:
        if runs:
            raise ConfigError(
                f"--incomplete with {runs[0]}: name runs, or take all incomplete ones"
            )
        return _all_incomplete(overrides)
    if not runs:
        raise ConfigError("resume needs a RUN, or --incomplete; see forgelm resume --help")
    return _each(runs, overrides)


def _all_incomplete(overrides: Sequence[str]) -> int:
    from forgelm.run.paths import OutputRoot
    from forgelm.run.registry import incomplete

    given = [word.partition("=")[2] for word in overrides if word.startswith("output_root=")]
    root = Path(given[-1] if given else "outputs").expanduser()
    runs = incomplete(OutputRoot(root))
    if not runs:
        print(f"no incomplete runs below {root}")
        return EXIT_OK
    return _each([str(run) for run in runs], overrides, skip_busy=True)


def _each(runs: Sequence[str], overrides: Sequence[str], skip_busy: bool = False) -> int:
    codes = []
    for run in runs:
        if len(runs) > 1:
            print(f"-- {run}", flush=True)
        codes.append(_one(run, overrides, skip_busy))
    return worst(codes)


def _one(run: str, overrides: Sequence[str], skip_busy: bool) -> int:
    from forgelm.config.compose import Request
    from forgelm.config.request import check_request
    from forgelm.start import start

    try:
        (point,) = check_request(Request(tuple(overrides)))
        # Not through Hydra: a folder's name may be anything.
        config = replace(point.config, resume=run)
        return start(config, list(overrides), in_sweep=False, teacher_run=None)
    except RunInUse as busy:
        if not skip_busy:
            return complain(busy)
        print(f"left alone: {busy}", flush=True)
        return EXIT_OK
    except ForgeError as error:
        return complain(error)
    except Exception as error:
        return crash(error, debug="debug=true" in overrides)
