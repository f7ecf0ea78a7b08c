"""Whether this machine can do its work: a row for each thing looked at. Prints nothing."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from forgelm import __version__, network, slurm
from forgelm.airgap import check, environment
from forgelm.airgap.check import Finding, Severity
from forgelm.airgap.needs import base_of, cached_commit, needs
from forgelm.airgap.readable import barred
from forgelm.config.compose import Request
from forgelm.config.request import Point
from forgelm.config.schema import WandbMode
from forgelm.errors import in_brief
from forgelm.hubcache import CachedRepo, cached_repos, datasets_cache, hub_cache, offline
from forgelm.log import log
from forgelm.redact import redact

_LEAST_PYTHON = (3, 11)
_TIMEOUT_S = 5.0
_LITTLE, _NOTHING = 5 << 30, 64 << 20
_EXTRAS = ("eval", "lora", "quant", "rl", "ocr", "slurm")
_SLURM = ("sbatch", "squeue", "scontrol")


class Status(StrEnum):
    ok = "ok"
    info = "info"
    warn = "warn"
    fail = "fail"
    crash = "crash"


@dataclass(frozen=True)
class Check:
    """A thing looked at; `remedy` is what to do about it."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is to be looked at.

    Attributes:
        offline: for a machine without a network: its caches instead of the hub.
        deep: hash all that is in the hub cache.
        request: the runs to be tried, with `points` as checked and `words` as typed.
        by_slurm: whether these are to be submitted.
    """

    offline: bool = False
    deep: bool = False
    request: Request | None = None
    points: Sequence[Point] = ()
    words: Sequence[str] = ()
    by_slurm: bool = False


def examine(asked: Asked) -> Iterator[Check]:
    """Every check in turn; one that crashes is a row too."""
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("extras", _extras),
        ("torch", _torch),
        ("environment", partial(_environment, asked)),
        ("disk", partial(_disks, asked)),
        *(
            [
                ("hub cache", partial(_hub_content, asked)),
                ("datasets cache", _datasets_content),
            ]
            if asked.offline
            else [("hub", _hub)]
        ),
        ("slurm", partial(_slurm, asked)),
        ("wandb", partial(_wandb, asked)),
    ]
    if asked.request is not None:
        parts.append(("run", partial(_run, asked, asked.request)))
    for name, part in parts:
        yield from _guarded(name, part)


def _guarded(name: str, part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from part()
    except Exception as error:
        log.debug("the check %s crashed", name, exc_info=error)
        said = redact(in_brief(f"{type(error).__name__}: {error}"))
        yield Check(name, Status.crash, said, "--log-level DEBUG shows where")


def _python() -> Iterator[Check]:
    words = f"{platform.python_version()} ({sys.executable}), forgelm {__version__}"
    if sys.version_info < _LEAST_PYTHON:
        least = ".".join(map(str, _LEAST_PYTHON))
        yield Check("python", Status.fail, words, f"use Python {least} or later")
    else:
        yield Check("python", Status.ok, words)


def _packages() -> Iterator[Check]:
    """What forgelm requires, as its own package says it."""
    needed = _requirements(None)
    if not needed:
        text = "forgelm isn't installed as a package: what it requires isn't known"
        yield Check("packages", Status.warn, text, "pip install -c requirements.lock .")
        return
    wrong = _unmet(needed)
    if wrong:
        words = shlex.join(str(requirement) for requirement, _ in wrong)
        text = ", ".join(f"{requirement} ({here})" for requirement, here in wrong)
        yield Check("packages", Status.fail, f"not as required: {text}", f"pip install {words}")
    else:
        yield Check("packages", Status.ok, f"all {len(needed)} as required")


def _extras() -> Iterator[Check]:
    here: list[str] = []
    lacking: list[str] = []
    for extra in _EXTRAS:
        needed = _requirements(extra)
        wrong = _unmet(needed)
        old = [f"{requirement} ({found})" for requirement, found in wrong if found != "missing"]
        if old:
            text, words = ", ".join(old), shlex.join(str(requirement) for requirement, _ in wrong)
            yield Check(f"extra {extra}", Status.warn, f"needs {text}", f"pip install {words}")
        elif needed:
            (lacking if wrong else here).append(extra)
    text = f"here: {', '.join(here) or 'none'}"
    if not lacking:
        yield Check("extras", Status.info, text)
        return
    yield Check(
        "extras",
        Status.info,
        f"{text}; not here: {', '.join(lacking)}",
        f"pip install 'forgelm[{','.join(lacking)}]', where you need them",
    )


def _requirements(extra: str | None) -> list[Any]:
    """forgelm's requirements: those of an extra, or those that it always has."""
    from packaging.requirements import Requirement

    try:
        found = [Requirement(line) for line in metadata.requires("forgelm") or []]
    except metadata.PackageNotFoundError:
        return []

    def holds(one: Requirement, extra: str) -> bool:
        return one.marker is None or one.marker.evaluate({"extra": extra})

    if extra is None:
        return [one for one in found if holds(one, "")]
    return [one for one in found if holds(one, extra) and not holds(one, "")]


def _unmet(needed: Sequence[Any]) -> list[tuple[Any, str]]:
    """The requirements that aren't met, less their markers, and what is here instead."""
    wrong = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            requirement.marker = None
            wrong.append((requirement, version))
    return wrong


def _torch() -> Iterator[Check]:
    import torch

    from forgelm.run.metadata import machine

    here = machine()
    build = torch.version.cuda or getattr(torch.version, "hip", None)
    words = f"{torch.__version__}, {f'CUDA {build}' if torch.version.cuda else build or 'CPU only'}"
    driver = here["driver"]
    if driver is None or torch.cuda.is_available():
        yield Check("torch", Status.ok, words + (f", driver {driver}" if driver else ""))
    elif torch.version.cuda is None:
        text = f"{words}: there is an NVIDIA driver ({driver}), and this build can't use it"
        remedy = "install a build of torch with CUDA: https://pytorch.org/get-started/locally"
        yield Check("torch", Status.warn, text, remedy)
    else:
        text = f"{words}: no GPU can be used with driver {driver}"
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a newer CUDA needs a newer driver"
        yield Check("torch", Status.warn, text, remedy)
    names = [name for name in here["devices"] if name != "cpu"]
    if torch.backends.mps.is_available():
        names.append("MPS")
    cpu = f"{here['cpu']}, {here['cpu_count']} cores, {here['threads']} threads"
    yield Check("devices", Status.info, ", ".join([*names, cpu]))


def _environment(asked: Asked) -> Iterator[Check]:
    troubles = environment.troubles(asked.offline)
    for trouble in troubles:
        status = Status.fail if trouble.bars else Status.warn
        yield Check("environment", status, redact(trouble.problem), redact(trouble.remedy))
    if not troubles:
        text = redact(", ".join(environment.shown())) or "none of its variables is set"
        yield Check("environment", Status.ok, text)


def _disks(asked: Asked) -> Iterator[Check]:
    roots = dict.fromkeys(Path(p.config.output_root).expanduser().absolute() for p in asked.points)
    for name, folder in (
        ("hub cache", hub_cache()),
        ("datasets cache", datasets_cache()),
        *(("output root", root) for root in roots or [Path("outputs").absolute()]),
    ):
        yield _disk(name, folder, may_be_read_only=name == "hub cache" and asked.offline)


def _disk(name: str, folder: Path, may_be_read_only: bool) -> Check:
    there = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    free = shutil.disk_usage(there).free
    text = f"{folder}: {free / 2**30:.1f} GiB free"
    title = f"disk: {name}"
    if not there.is_dir():
        return Check(title, Status.fail, f"{folder}: {there} isn't a folder", "give another place")
    if not os.access(there, os.W_OK | os.X_OK) and not may_be_read_only:
        remedy = "give yourself the right to write there, or another place"
        return Check(title, Status.warn, f"{folder}: can't be written to", remedy)
    if free < _NOTHING:
        return Check(title, Status.fail, text, "make room")
    if free < _LITTLE:
        return Check(title, Status.warn, text, "make room: models take gigabytes")
    return Check(title, Status.ok, text)


def _hub() -> Iterator[Check]:
    """One request: it says whether the hub answers, and whether it knows the token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
    )

    from forgelm.hub import token_name

    if offline():
        text = "HF_HUB_OFFLINE is set: not asked"
        yield Check("hub", Status.info, text, "forgelm doctor --offline looks at the caches")
        return
    if (mistake := network.mistake()) is not None:
        yield Check("hub", Status.fail, f"not asked: {mistake}", "set the variable right")
        return
    import httpx2

    url, source = constants.ENDPOINT, token_name()
    try:
        headers = build_hf_headers()
        answer = get_session().get(f"{url}/api/whoami-v2", headers=headers, timeout=_TIMEOUT_S)
    except (httpx2.HTTPError, OSError) as error:
        reason = redact(in_brief(str(error))) or type(error).__name__
        proxy = network.proxy_for(url)
        through = f" through the proxy of {proxy}" if proxy else ""
        remedy = (
            "check the network, proxies and HF_ENDPOINT; for a machine without a network: "
            "forgelm doctor --offline"
        )
        yield Check("hub", Status.fail, f"{url} can't be reached{through}: {reason}", remedy)
        return
    if answer.status_code >= 500:
        text = f"{url} answers with status {answer.status_code}"
        yield Check("hub", Status.fail, text, "try again later")
        return
    yield Check("hub", Status.ok, f"{url} answers")
    if source is None:
        text = "none: gated and private repositories can't be read"
        yield Check("token", Status.info, text, "hf auth login, or HF_TOKEN, where you need them")
    elif answer.status_code == 200:
        name = answer.json().get("name", "somebody")
        yield Check("token", Status.ok, f"that of {source} is accepted, as {name}")
    elif answer.status_code in (401, 403):
        remedy = f"make a new one at {url}/settings/tokens"
        yield Check("token", Status.fail, f"that of {source} isn't accepted", remedy)
    else:
        text = f"that of {source}; this hub doesn't say whom it belongs to"
        yield Check("token", Status.info, text)


def _hub_content(asked: Asked) -> Iterator[Check]:
    hub = hub_cache()
    if (shut := barred(hub)) is not None:
        yield Check("hub cache", Status.fail, shut.problem, shut.remedy)
        return
    repos = list(cached_repos(hub))
    if not repos:
        remedy = "forgelm cache OVERRIDES, or forgelm cache-models, on a machine with a network"
        text = f"{hub} holds nothing: only embedded tasks and tiny models run without it"
        yield Check("hub cache", Status.warn, text, remedy)
    needed = _needed(asked.points)
    for repo in repos:
        if asked.deep:
            log.info(f"hashing {check.thing(repo)}")
        matters = needed is None or (repo.kind, repo.repo_id) in needed
        yield from _guarded(check.thing(repo), partial(_repo, repo, asked.deep, matters))


def _needed(points: Sequence[Point]) -> set[tuple[str, str]] | None:
    """The repositories that the runs asked for need; None where none are asked for."""
    if not points:
        return None
    wanted = needs(point.config for point in points)
    models, names = list(wanted.models), {("dataset", data.path) for data in wanted.data}
    for model in models:
        folder: Path | None = Path(model.path).expanduser()
        if folder is not None and not folder.is_dir():
            names.add(("model", model.path))
            repo = CachedRepo(hub_cache(), "model", model.path)
            commit = cached_commit(repo, model.revision)
            folder = repo.snapshot(commit) if commit else None
        base = base_of(model, folder) if folder is not None else None
        if base is not None:
            models.append(base)
    return names


def _repo(repo: CachedRepo, deep: bool, matters: bool) -> Iterator[Check]:
    """What is wrong with a repository; none of it bars runs that don't need it."""
    findings = check.problems(repo, deep)
    for found in map(_as_check, findings):
        barring = found.status is Status.fail and not matters
        yield replace(found, status=Status.warn) if barring else found
    if not findings:
        names = ", ".join(repo.refs()) or "no name"
        whole = "all bytes hashed" if deep else "verified"
        text = f"{len(repo.commits())} commit(s), {names}; {whole}"
        yield Check(check.thing(repo), Status.ok, text)


def _datasets_content() -> Iterator[Check]:
    cache, count = datasets_cache(), 0
    if (shut := barred(cache)) is not None:
        yield Check("datasets cache", Status.fail, shut.problem, shut.remedy)
        return
    for found in check.prepared(cache):
        count += 1
        yield from map(_as_check, found.findings)
        if not found.findings:
            rows = ", ".join(f"{split}: {number} rows" for split, number in found.rows.items())
            yield Check(found.thing, Status.ok, rows or "no rows")
    if not count:
        remedy = "forgelm cache OVERRIDES, or forgelm cache-tasks, on a machine with a network"
        text = f"{cache} holds nothing: only embedded tasks and own files can be read without it"
        yield Check("datasets cache", Status.warn, text, remedy)


def _as_check(finding: Finding) -> Check:
    status = Status.fail if finding.severity is Severity.error else Status.warn
    return Check(finding.thing, status, finding.problem, finding.remedy)


def _slurm(asked: Asked) -> Iterator[Check]:
    missing = [name for name in _SLURM if shutil.which(name) is None]
    bad = Status.fail if asked.by_slurm else Status.warn
    if missing == [*_SLURM]:
        status = Status.fail if asked.by_slurm else Status.info
        remedy = "submit from a machine of the cluster" if asked.by_slurm else None
        yield Check("slurm", status, "not here: runs are trained on this machine", remedy)
    elif missing:
        remedy = "put all of Slurm's commands into PATH"
        yield Check("slurm", bad, f"{', '.join(missing)} not found", remedy)
    elif (said := slurm.silent()) is not None:
        remedy = "ask those who run the cluster, or wait"
        yield Check("slurm", bad, f"the controller doesn't answer: {said}", remedy)
    elif slurm.accounts():
        yield Check("slurm", Status.ok, "the controller answers, and keeps accounts of jobs")
    else:
        text = "the controller answers; without accounting it forgets jobs minutes after they end"
        yield Check("slurm", Status.ok, text)


def _wandb(asked: Asked) -> Iterator[Check]:
    online = any(point.config.wandb.mode is WandbMode.online for point in asked.points)
    known = _logged_in()
    if online and (asked.offline or not known):
        text = "wandb.mode=online " + (
            "needs a network" if asked.offline else "needs an account, and nobody is logged in"
        )
        remedy = "wandb.mode=offline" + ("" if asked.offline else ", or: wandb login")
        yield Check("wandb", Status.fail, text, remedy)
        return
    who = "logged in" if known else "nobody is logged in"
    how = "online" if online else "runs are kept here unless wandb.mode=online"
    yield Check("wandb", Status.ok if online else Status.info, f"{who}; {how}")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = re.sub(r"^\w+://|[/:].*$", "", base)
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return re.search(rf"machine\s+{re.escape(host)}\b", file.read_text()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _run(asked: Asked, request: Request) -> Iterator[Check]:
    """What the run loads, loaded by another process."""
    from forgelm.airgap.rehearse import rehearse

    command = redact(f"forgelm cache {shlex.join(asked.words)}".rstrip())
    if asked.offline:
        command += ", on a machine with a network"
    for part in rehearse(request, asked.offline):
        name = f"run: {part.name}"
        if not part.tried:
            yield Check(name, Status.info, part.detail)
        elif part.problem is not None:
            remedy = command if part.fetchable else "change what is asked for, as it says"
            yield Check(name, Status.fail, part.problem, remedy)
        elif part.asked:
            text = f"{part.detail}; yet it tried to reach {', '.join(part.asked)}"
            remedy = "where a network drops what it doesn't let through, that waits"
            yield Check(name, Status.warn, text, remedy)
        else:
            yield Check(name, Status.ok, part.detail)
