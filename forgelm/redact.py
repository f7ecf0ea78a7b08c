"""What looks like a token, and text without it. Tokens never reach a file, a log or a screen."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
    r"github_pat_[A-Za-z0-9_]{30,}|AKIA[0-9A-Z]{16}|xox[abp]-[A-Za-z0-9-]{10,}|wandb_v1_\w{20,}|"
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?i:api_?key|token|password)=\S{8,}"
)


def has_token(text: str) -> bool:
    return _TOKEN.search(text) is not None


def redact(text: str) -> str:
    """The text with everything that looks like a token blotted out."""
    return _TOKEN.sub("[redacted]", text)
