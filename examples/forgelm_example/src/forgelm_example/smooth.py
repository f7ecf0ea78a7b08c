"""The keys of mode=smooth. Without torch: wrong requests are refused before that is imported."""

from dataclasses import dataclass
from typing import ClassVar

from forgelm.config.schema import option


@dataclass
class SmoothConfig:
    """Cross-entropy with label smoothing, Szegedy et al. 2016."""

    trainer: ClassVar[str] = "forgelm_example.smooth_trainer:build"

    name: str = "smooth"
    smoothing: float = option(0.1, min=0, below=1)
    """Share of the target that is spread evenly over all outputs."""
