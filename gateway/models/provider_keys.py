"""Keys of providers: from the environment, by a name that is in the configuration.

Whoever may edit a provider chooses both the name and the place that its value is sent to. So only
variables that are meant for this can be named, and not those of the worker or the gateway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from gateway.models.faults import NO_SECRET, ProviderError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,111}_API_KEY")
_OURS = ("WAN_", "CHAT_", "SDXL_", "WORKER_", "GATEWAY_", "VERBATIM_", "SUPABASE_")


def may_be_sent(name: str) -> bool:
    """Whether a variable may hold a provider's key: its name ends in _API_KEY and is not ours."""
    return _NAME.fullmatch(name) is not None and not name.upper().startswith(_OURS)


def authorization(secret_ref: str | None, secret: Callable[[str], str | None]) -> Mapping[str, str]:
    """The header for a provider; none where it needs no key. Raises ProviderError (no_secret)."""
    if secret_ref is None:
        return {}
    if not may_be_sent(secret_ref):
        raise ProviderError(
            NO_SECRET,
            "the provider's secret_ref is not the name of a provider's key; "
            "use a variable whose name ends in _API_KEY",
        )
    value = secret(secret_ref)
    if not value:
        raise ProviderError(NO_SECRET, f"secret {secret_ref} is not set")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ProviderError(
            NO_SECRET, f"secret {secret_ref} has a character that a header cannot carry"
        )
    return {"Authorization": f"Bearer {value}"}
