"""The environment's words on how the hub is reached: its address, and proxies."""

from __future__ import annotations

import os
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

_SCHEMES = ("http", "https", "socks5", "socks5h")


def mistake() -> str | None:
    """What no client can work with; names the variable, and never shows a proxy's password."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not _is_url(endpoint, ("http", "https")):
        return f"HF_ENDPOINT={endpoint}: give a whole URL, such as https://{_bare(endpoint)}"
    for name, value in _proxies().items():
        url = value if "://" in value else f"http://{value}"
        if not _is_url(url, _SCHEMES):
            return (
                f"{name}: its value isn't the URL of a proxy, such as http://host:3128, or unset it"
            )
        if url.startswith("socks") and find_spec("socksio") is None:
            return (
                f"{name}: a SOCKS proxy needs the package socksio: pip install socksio, or unset it"
            )
    return None


def proxy_for(endpoint: str) -> str | None:
    """The variable whose proxy requests to the hub go through; None where there is none."""
    parts = urlsplit(endpoint)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    found = {name.lower(): name for name in _proxies()}
    return found.get(f"{parts.scheme}_proxy") or found.get("all_proxy")


def _proxies() -> dict[str, str]:
    """The variables that are read; of two spellings the one in small letters."""
    kept = {}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelt in (name, name.upper()):
            if os.environ.get(spelt):
                kept[spelt] = os.environ[spelt]
                break
    return kept


def _bare(endpoint: str) -> str:
    return endpoint.rpartition("://")[2].split("/")[0].partition(":")[0] or "huggingface.co"


def _is_url(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
