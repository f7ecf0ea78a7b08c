"""`forgelm drill`: prove that a config can be interrupted anywhere and ends with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forgelm.cli.train import request_from
from forgelm.cluster import launchers
from forgelm.config.request import check_request, teacher_run
from forgelm.config.schema import RunConfig
from forgelm.errors import EXIT_OK, ConfigError, RunError


def main(argv: Sequence[str]) -> int:
    """Drill the config that the overrides compose; returns EXIT_OK only if everything holds.

    Raises:
        RunError: something differs, or the config fails by itself.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return EXIT_OK
    request = request_from(argv)
    points = check_request(request)
    if len(points) > 1:
        raise ConfigError(f"drill takes one config, not a sweep of {len(points)}: leave out -m")
    if launchers.chosen(points[0].composed) is not None:
        raise ConfigError("drill interrupts runs of its own, here: leave out hydra/launcher")
    config = points[0].config
    if config.resume is not None:
        raise ConfigError(f"resume={config.resume}: drill makes runs of its own; leave it out")
    from forgelm.drill import cases, drill, small, small_teacher, workplace
    from forgelm.report import drill_row, drill_rows, table
    from forgelm.start import start

    with workplace(Path(config.output_root)) as folder:
        teacher = small_teacher(teacher_run(config, request.compose), folder)

        def begin(point: RunConfig) -> int:
            return start(point, list(argv), in_sweep=False, teacher_run=teacher)

        outcomes = []
        drilled = small(config, folder)
        chosen = cases(drilled)
        print(f"drill: {len(chosen)} interruptions of this config, in {folder}", flush=True)
        for outcome in drill(begin, drilled, chosen):
            outcomes.append(outcome)
            print(f"  {drill_row(outcome)}", flush=True)
        print(table(drill_rows(outcomes)))
        wrong = [outcome for outcome in outcomes if not outcome.holds]
        if wrong:
            first = wrong[0].problems[0] if wrong[0].problems else "see the table"
            raise RunError(
                f"{len(wrong)} of {len(outcomes)} interruptions don't hold: {wrong[0].case.title}, "
                f"{wrong[0].case.signal}: {first}; the runs are kept in {folder}"
            )
        print(f"all {len(outcomes)} hold: interrupted anywhere, it ends with the same bytes")
    return EXIT_OK


_HELP = """\
usage: forgelm drill [OVERRIDES]

Runs the config small and uninterrupted, then interrupts it once at each place (by signal and by
SIGKILL), goes on, and compares weights, optimizer, metrics, evaluations and data order.
Exit code 0 only if everything is the same.

  forgelm drill
  forgelm drill mode=kd model=distilbert task=mnli
"""
