"""`forgelm cache-models`: models from the hub into its cache, every byte checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgelm.airgap.verify import a_path
from forgelm.cli.arguments import Failed, answer, cache_parser, listen

if TYPE_CHECKING:
    from forgelm.airgap.models import Row

_MIB = 2**20


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "cache-models",
        "Bring models from the hub into its cache, every byte checked, so that they load offline.",
    )
    made.add_argument(
        "--model",
        metavar="HUB_ID",
        action="append",
        default=[],
        help="organisation/name, organisation/name@revision, or a folder here; may be repeated",
    )
    made.add_argument("--safety", metavar="HUB_ID", help="a safety classifier to cache besides")
    made.add_argument(
        "--output",
        metavar="DIR",
        type=a_path,
        help="the cache (default: HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub)",
    )
    made.add_argument(
        "--audit-dir",
        metavar="DIR",
        type=a_path,
        help="where the audit log is (default: the cache)",
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap import models
    from forgelm.airgap.audit import AuditLog
    from forgelm.cli.places import chosen_cache, require_hub, warn_of
    from forgelm.cli.progress import Bytes
    from forgelm.errors import ConfigError
    from forgelm.hubcache import hub_cache

    listen(arguments)
    if not arguments.model and arguments.safety is None:
        raise ConfigError("cache-models needs --model HUB_ID, --safety HUB_ID, or both")
    asked = models.asked_for(arguments.model, arguments.safety)
    require_hub("cache-models")
    hub = chosen_cache(arguments.output, hub_cache())
    warn_of(hub, {"HF_HUB_CACHE": str(hub)}, {"HF_HUB_CACHE": str(hub_cache())})
    audit = AuditLog.open(arguments.audit_dir or hub)
    request = {
        "models": [one.name for one in asked],
        "cache_dir": str(hub),
        "safety_classifier": arguments.safety,
    }
    audit.write("cache.populate_models_requested", **request)
    shown = Bytes()

    def failed(done: list[str], error: BaseException) -> None:
        told = {"error_class": type(error).__name__, "error_message": str(error)}
        audit.write("cache.populate_models_failed", **request, models_completed=done, **told)

    try:
        rows = models.cache(asked, hub, shown)
    except BaseException as error:
        failed([one.name for one in asked if one.wanted in shown.landed_ones], error)
        raise
    problems = sorted(
        (row.error for row in rows if row.error is not None), key=lambda error: -error.exit_code
    )
    size = sum(row.size_bytes for row in rows)
    result = {
        "models": [_shown(row) for row in rows],
        "total_size_mb": round(size / _MIB, 2),
        "cache_dir": str(hub),
    }
    if problems:
        failed([row.name for row in rows if row.error is None], problems[0])
        return Failed(result, problems)
    audit.write(
        "cache.populate_models_completed", **request, total_size_bytes=size, count=len(rows)
    )
    return result


def _shown(row: Row) -> dict[str, Any]:
    if row.error is not None:
        return {"name": row.name, "error": str(row.error), "error_class": type(row.error).__name__}
    return {
        "name": row.name,
        "cached_path": str(row.path),
        "size_bytes": row.size_bytes,
        "size_mb": round(row.size_bytes / _MIB, 2),
        "duration_s": round(row.duration_s, 1),
    }


def _text(result: dict[str, Any]) -> str:
    rows, total = result["models"], result["total_size_mb"]
    landed = sum("error" not in row for row in rows)
    count = f"{landed}" if landed == len(rows) else f"{landed} of {len(rows)}"
    lines = [f"Cached {count} model(s); {total:.2f} MiB total under {result['cache_dir']}."]
    for row in rows:
        what = (
            "failed" if "error" in row else f"{row['size_mb']:.2f} MiB ({row['duration_s']:.1f}s)"
        )
        lines.append(f"  - {row['name']}: {what}")
    return "\n".join(lines)
