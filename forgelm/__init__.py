"""forgelm: a Hydra-composed experiment launcher for language models."""

__version__ = "0.1.0"
