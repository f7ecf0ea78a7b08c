"""The caches that data sets and lm-eval's tasks need, and the variables that name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgelm.hubcache import datasets_cache, hf_home, hub_cache


@dataclass(frozen=True)
class Caches:
    """Folders: repositories, prepared data sets, downloaded code, and what `evaluate` downloads.

    `nltk` is None where nltk looks in its usual places.
    """

    hub: Path
    datasets: Path
    modules: Path
    evaluate: Path
    nltk: Path | None = None

    @classmethod
    def usual(cls, environment: Mapping[str, str] = os.environ) -> Caches:
        """Those that the environment names, as Hugging Face's libraries read it."""
        home = hf_home(environment)

        def given(variable: str, default: str) -> Path:
            found = environment.get(variable)
            return Path(found).expanduser().absolute() if found else home / default

        return cls(
            hub_cache(environment),
            datasets_cache(environment),
            given("HF_MODULES_CACHE", "modules"),
            given("HF_EVALUATE_CACHE", "evaluate"),
        )

    @classmethod
    def below(cls, datasets: Path) -> Caches:
        """All of them in the folder of the prepared data sets, so that it can be carried whole."""
        inside = (datasets / name for name in ("hub", "modules", "evaluate", "nltk_data"))
        hub, modules, evaluate, nltk = inside
        return cls(hub, datasets, modules, evaluate, nltk)

    def places(self) -> dict[str, str]:
        """The variables of Hugging Face's libraries that name these folders."""
        named = {
            "HF_DATASETS_CACHE": self.datasets,
            "HF_HUB_CACHE": self.hub,
            "HF_MODULES_CACHE": self.modules,
            "HF_EVALUATE_CACHE": self.evaluate,
        }
        return {name: str(path) for name, path in named.items()}

    def variables(self) -> dict[str, str]:
        """What makes the libraries use these folders, if it is set before they are imported."""
        nltk = self.nltk is not None and self.nltk.is_dir()
        return self.places() | ({"NLTK_DATA": str(self.nltk)} if nltk else {})
