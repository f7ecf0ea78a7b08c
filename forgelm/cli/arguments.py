"""What the commands other than train share: their parser, and output that a program reads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from forgelm.errors import EXIT_OK, EXIT_TRAINING_ERROR, ConfigError, ForgeError
from forgelm.redact import redact


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are wrong requests like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parser(name: str, description: str) -> Parser:
    """A parser with the options that every such command has."""
    made = Parser(prog=f"forgelm {name}", description=description)
    made.add_argument("run", metavar="RUN", help="a run directory, a run id, or a run's name")
    made.add_argument(
        "--output-root", default="outputs", help="where names are looked up (default: outputs)"
    )
    made.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one document on stdout",
    )
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def check_output(output: Path) -> None:
    """Refuse a file that can't be written before any work is done."""
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; give a file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder doesn't exist; make it first")


def answer(
    arguments: Sequence[str],
    made: Parser,
    work: Callable[[argparse.Namespace], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
) -> int:
    """Parse, work, and print the result as text or as one JSON document; returns the exit code.

    `work` returns the result's keys; `success`, and `error` with `error_class`, are added here.
    """
    as_json = "json" in arguments and "--output-format" in arguments
    as_json = as_json or "--output-format=json" in arguments
    debug = "--debug" in arguments
    try:
        result = {"success": True, **work(made.parse_args(list(arguments)))}
    except ForgeError as error:
        return _fail(error, str(error).splitlines(), error.exit_code, as_json, debug)
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return _fail(error, [line], EXIT_TRAINING_ERROR, as_json, debug)
    print(json.dumps(result, indent=2) if as_json else text(result))
    return EXIT_OK


def _fail(error: Exception, lines: list[str], code: int, as_json: bool, debug: bool) -> int:
    lines = [redact(line) for line in lines]
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if as_json:
        name = type(error).__name__
        print(json.dumps({"success": False, "error": "; ".join(lines), "error_class": name}))
    for line in lines:
        print(f"forgelm: {line}", file=sys.stderr)
    return code
