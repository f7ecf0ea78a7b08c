"""A process with caches of its own, online or with no network at all, that works when asked.

Hugging Face's libraries read where their caches are when they are imported, so whatever must land
in other folders, or be proved to load without a network, is done here.

`python -m forgelm.airgap.child online|offline` reads a request a line on stdin, `{"work": ...,
"arguments": {...}}`, calls that function of `forgelm/airgap/loading.py`, and writes an answer a
line on stdout: `{"value": ...}`, or `{"error": ..., "wrong_request": ...}`. What libraries print
goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from typing import IO, Any, NoReturn

from forgelm.airgap.caches import Caches
from forgelm.airgap.cutoff import cut_off
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hubcache import OFFLINE
from forgelm.log import log

_PATIENCE_S = 5.0
_SAID = 300


class ChildDied(RunError):
    """The process ended without an answer: a signal, or no memory."""


class Child:
    """A process to call; it starts with the first call, and anew after it died."""

    def __init__(self, caches: Caches, *, online: bool) -> None:
        self._caches, self._online = caches, online
        self._process: subprocess.Popen[str] | None = None
        self._chatter: IO[str] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def call(self, work: str, **arguments: Any) -> Any:
        """What a function of `loading` returns.

        Raises:
            ConfigError, RunError: what it raised.
            ChildDied: the process ended instead.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"work": work, "arguments": arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            self.end()
            raise
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise (ConfigError if answer["wrong_request"] else RunError)(answer["error"])
        return answer["value"]

    def end(self) -> None:
        """End it, and whatever it started."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.communicate()
        self._open.close()

    def _start(self) -> subprocess.Popen[str]:
        if log.getEffectiveLevel() > logging.DEBUG:
            chatter = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._chatter = self._open.enter_context(chatter)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forgelm.airgap.child", "online" if self._online else "offline"],
            env=_environment(self._caches, self._online),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._chatter,
            text=True,
            encoding="utf-8",
            # So that a Ctrl-C reaches this process alone, and its end takes all of its own along.
            start_new_session=True,
        )
        return self._process

    def _died(self) -> ChildDied:
        assert self._process is not None
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = 0
        said = ""
        if self._chatter is not None:
            self._chatter.seek(0)
            said = " ".join(self._chatter.read().split())[-_SAID:]
        self.end()
        if code >= 0:
            return ChildDied(f"the process ended with {code}{said and ': ' + said}")
        name = signal.Signals(-code).name
        why = " (no memory left, as a rule)" if -code == signal.SIGKILL else ""
        return ChildDied(f"the process was killed by {name}{why}")


def _environment(caches: Caches, online: bool) -> dict[str, str]:
    # Not this process's folder, which may hold a module by any name.
    paths = [os.path.abspath(path) for path in sys.path if path]
    switches = dict.fromkeys(OFFLINE, str(int(not online)))
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    search = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    return os.environ | caches.variables() | switches | quiet | search


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> NoReturn:
    """The process's own part."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is printed must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if sys.argv[1] == "offline":
        cut_off()
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        answers.write(_answer(requests.get()) + "\n")
        answers.flush()


def _listen(requests: queue.Queue[str]) -> None:
    """Ends the process with the one that asks, also amid work."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _answer(line: str) -> str:
    from forgelm.airgap import loading

    request = json.loads(line)
    try:
        value = getattr(loading, request["work"])(**request["arguments"])
        return json.dumps({"value": value})
    except ForgeError as error:
        return json.dumps({"error": str(error), "wrong_request": isinstance(error, ConfigError)})
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())[:_SAID]
        return json.dumps({"error": f"{type(error).__name__}: {text}", "wrong_request": False})


if __name__ == "__main__":
    main()
