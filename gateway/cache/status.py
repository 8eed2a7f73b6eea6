"""What is served and who serves what, as JSON values for /api/cache/status."""

from __future__ import annotations

from typing import Any

from gateway.cache.holder import Held
from gateway.cache.instances import Instances
from gateway.cache.record import describe
from gateway.errors import GatewayError


def of_held(held: Held) -> dict[str, Any]:
    return {
        "revision": held.snapshot.revision,
        "content_hash": held.snapshot.content_hash,
        "fallback_level": held.level,
        "age_ms": held.age_ms,
        "flags": list(held.flags),
        "templates": len(held.snapshot.templates),
    }


def of_instances(instances: Instances) -> dict[str, Any]:
    """The list, or None and why it cannot be had."""
    try:
        rows = instances.all()
    except GatewayError as exc:
        return {"instances": None, "instances_error": describe(exc)}
    return {
        "instances": [
            {
                "instance_id": one.instance_id,
                "applied_revision": one.applied_revision,
                "seen_s": round(one.seen_s, 3),
                "live": one.is_live,
                "url": one.url,
            }
            for one in rows
        ]
    }
