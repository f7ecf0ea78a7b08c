"""The environment variables that decide where things lie and whether the network is used."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from forgelm.airgap.readable import barred
from forgelm.hubcache import datasets_cache, hf_home, hub_cache, is_on, offline

PREFIXES = ("HF_", "TRANSFORMERS_", "HUGGING", "FORGELM_")
OURS = (
    "FORGELM_AUDIT_SECRET",
    "FORGELM_BEGAN",
    "FORGELM_HANDOVER",
    "FORGELM_HUB_PATIENCE",
    "FORGELM_INTERRUPT",
    "FORGELM_OPERATOR",
    "FORGELM_SIGNAL_LEAD_S",
)
_PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
_KNOWN = (*_PLACES, "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN")
_SECRET = ("TOKEN", "SECRET", "KEY")
_LIKE = 0.9


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a variable, and what to do; `bars`: nothing will work so."""

    problem: str
    remedy: str
    bars: bool = False


def shown(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The variables that are set, secrets without their values."""
    return [
        name if any(word in name for word in _SECRET) else f"{name}={value}"
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES)
    ]


def troubles(to_be_offline: bool, environment: Mapping[str, str] = os.environ) -> list[Trouble]:
    """What is wrong with the environment; `to_be_offline`: for a machine without a network."""
    return [
        *_switches(to_be_offline, environment),
        *_old(environment),
        *_places(to_be_offline, environment),
        *_misnamed(environment),
    ]


def _switches(to_be_offline: bool, environment: Mapping[str, str]) -> Iterator[Trouble]:
    off = offline(environment)
    if to_be_offline and not off:
        yield Trouble(
            "HF_HUB_OFFLINE isn't set: without a network, libraries try the hub first, and wait",
            "export HF_HUB_OFFLINE=1",
        )
    theirs = environment.get("TRANSFORMERS_OFFLINE")
    if theirs and is_on("TRANSFORMERS_OFFLINE", environment) != off:
        first = environment.get("HF_HUB_OFFLINE")
        yield Trouble(
            f"TRANSFORMERS_OFFLINE={theirs} has no effect: HF_HUB_OFFLINE={first} goes before it",
            "unset TRANSFORMERS_OFFLINE",
        )
    own = environment.get("HF_DATASETS_OFFLINE")
    if own is not None and is_on("HF_DATASETS_OFFLINE", environment) != off:
        told = "offline" if off else "online"
        yield Trouble(
            f"HF_DATASETS_OFFLINE={own}, and the hub's clients are told to be {told}: models and "
            "data sets are looked for in different ways",
            "unset HF_DATASETS_OFFLINE; HF_HUB_OFFLINE counts for both",
        )


def _old(environment: Mapping[str, str]) -> Iterator[Trouble]:
    for name in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"):
        if name in environment:
            yield Trouble(
                f"{name}={environment[name]} isn't read any more: models are looked for in "
                f"{hub_cache(environment)}",
                f"unset {name}; export HF_HUB_CACHE instead",
            )
    if old := environment.get("HUGGINGFACE_HUB_CACHE"):
        used = not environment.get("HF_HUB_CACHE")
        which = "the old name of HF_HUB_CACHE" + ("" if used else ", which goes before it")
        yield Trouble(
            f"HUGGINGFACE_HUB_CACHE={old} is {which}",
            "unset HUGGINGFACE_HUB_CACHE" + (f"; export HF_HUB_CACHE={old}" if used else ""),
        )


def _places(to_be_offline: bool, environment: Mapping[str, str]) -> Iterator[Trouble]:
    home = environment.get("HF_HOME")
    hub, datasets = hub_cache(environment), datasets_cache(environment)
    if home and hf_home(environment) not in hub.parents:
        yield Trouble(
            f"HF_HUB_CACHE={hub} isn't below HF_HOME={home}: data sets are in {datasets}, tokens "
            "and modules below HF_HOME",
            "carry and set both, or unset one of them",
        )
    for name in _PLACES:
        given = environment.get(name)
        if not given:
            continue
        path = Path(os.path.expandvars(given)).expanduser()
        if not path.is_absolute():
            yield Trouble(
                f"{name}={given} is relative: another place in every folder",
                f"export {name}={path.absolute()}",
            )
        if barred(path) is not None:
            continue
        if path.exists() and not path.is_dir():
            yield Trouble(f"{name}={given} isn't a folder", f"give a folder to {name}", bars=True)
        elif to_be_offline and not path.exists():
            yield Trouble(f"{name}={given} doesn't exist", f"set {name} to where the cache lies")


def _misnamed(environment: Mapping[str, str]) -> Iterator[Trouble]:
    for name in sorted(environment):
        if name.startswith("FORGELM_") and name not in OURS:
            near = difflib.get_close_matches(name, OURS, n=1, cutoff=_LIKE)
            remedy = f"unset {name}" + (f"; {near[0]} was meant?" if near else "")
            if "CACHE" in name:
                remedy = f"unset {name}; export HF_HUB_CACHE and HF_DATASETS_CACHE instead"
            yield Trouble(f"{name} is no variable of forgelm: nothing reads it", remedy)
        elif name.startswith("HF_") and name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=_LIKE)
            if near:
                remedy = f"unset {name}; export {near[0]}"
                yield Trouble(f"{name} isn't read; {near[0]} is", remedy)
