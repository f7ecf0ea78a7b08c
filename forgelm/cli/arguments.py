"""What the commands other than train share: their parser, and output that a program reads."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from forgelm.errors import EXIT_OK, EXIT_TRAINING_ERROR, ConfigError, ForgeError
from forgelm.redact import redact


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are wrong requests like any other; flags aren't shortened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class WithOverrides(Parser):
    """Leaves Hydra's overrides and flags to Hydra, in `words`."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, words = self.parse_known_args(args, namespace)
        known.words = words
        return known


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


def cache_parser(name: str, description: str, kind: type[Parser] = Parser) -> Parser:
    """A parser with the options of the commands that fill, carry and check caches."""
    made = kind(prog=f"forgelm {name}", description=description)
    made.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one document on stdout",
    )
    made.add_argument("-q", "--quiet", action="store_true", help="no INFO lines, no progress")
    made.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="what is said on stderr (default: INFO); DEBUG shows tracebacks",
    )
    return made


def listen(arguments: argparse.Namespace) -> None:
    """Say what --log-level and --quiet ask for, on stderr."""
    from forgelm.log import log, set_up

    level = logging.getLevelName(arguments.log_level)
    set_up(level == logging.DEBUG, sys.stderr)
    log.setLevel(max(level, logging.WARNING) if arguments.quiet else level)


@dataclass(frozen=True)
class Failed:
    """A result of which some parts failed: its keys as on success, and what went wrong with them.

    The worst problem comes first; its class and exit code count for the whole.
    """

    result: dict[str, Any]
    problems: Sequence[Exception]


def check_output(output: Path) -> None:
    """Refuse a file that can't be written before any work is done."""
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; give a file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder doesn't exist; make it first")


def answer(
    arguments: Sequence[str],
    made: Parser,
    work: Callable[[argparse.Namespace], dict[str, Any] | Failed],
    text: Callable[[dict[str, Any]], str],
) -> int:
    """Parse, work, and print the result as text or as one JSON document; returns the exit code.

    `work` returns the result's keys; `success`, and `error` with `error_class`, are added here.
    What it returns as `Failed` is printed as on success, with the errors besides.
    """
    as_json = "json" in arguments and "--output-format" in arguments
    as_json = as_json or "--output-format=json" in arguments
    debug = "--debug" in arguments or "DEBUG" in arguments or "--log-level=DEBUG" in arguments
    try:
        with _ended_by_sigterm():
            result = work(made.parse_args(list(arguments)))
    except KeyboardInterrupt as stopped:
        if as_json:
            error = f"stopped by {str(stopped) or 'Ctrl-C'}"
            name = type(stopped).__name__
            print(json.dumps({"success": False, "error": error, "error_class": name}))
        raise
    except ForgeError as error:
        return _fail(error, str(error).splitlines(), error.exit_code, as_json, debug)
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return _fail(error, [line], EXIT_TRAINING_ERROR, as_json, debug)
    if isinstance(result, Failed):
        first, partial = result.problems[0], _redacted(result.result)
        if not as_json and (shown := text(partial)):
            print(shown)
        code = first.exit_code if isinstance(first, ForgeError) else EXIT_TRAINING_ERROR
        lines = [line for problem in result.problems for line in str(problem).splitlines()]
        return _fail(first, lines, code, as_json, debug, partial)
    result = {"success": True, **_redacted(result)}
    print(json.dumps(result, indent=2) if as_json else text(result))
    return EXIT_OK


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM (of timeout(1), of Slurm) ends the command as Ctrl-C does: cleanly, and said."""

    def stop(*_: Any) -> NoReturn:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _redacted(value: Any) -> Any:
    """What is printed, without what looks like a token."""
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _fail(
    error: Exception,
    lines: list[str],
    code: int,
    as_json: bool,
    debug: bool,
    partial: dict[str, Any] | None = None,
) -> int:
    lines = [redact(line) for line in lines]
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if as_json:
        name = type(error).__name__
        said = {"success": False, "error": "; ".join(lines), "error_class": name}
        print(json.dumps({**said, **(partial or {})}, indent=2 if partial else None))
    for line in lines:
        print(f"forgelm: {line}", file=sys.stderr)
    return code
