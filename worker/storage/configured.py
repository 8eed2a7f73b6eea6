"""The store that the environment names."""

from __future__ import annotations

from collections.abc import Mapping

from worker.errors import ConfigError
from worker.storage.s3_store import S3Store
from worker.storage.stores import ObjectStore
from worker.storage.supabase_store import SupabaseStore

# Two names of one secret: the first worker knew one, the other functions the second.
SERVICE_KEYS = ("SUPABASE_SERVICE_KEY", "SUPABASE_SERVICE_ROLE_KEY")
DEFAULT_BUCKET = "workspace-temp"

_S3 = ("S3_BUCKET", "S3_ENDPOINT_URL", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY")
_SUPABASE = ("SUPABASE_URL", *SERVICE_KEYS)


def store_from_environment(env: Mapping[str, str]) -> ObjectStore | None:
    """The store for finished files, None when no variable of one is set.

    S3: S3_BUCKET, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY, and where needed S3_ENDPOINT_URL,
    S3_REGION, S3_PREFIX. Supabase: SUPABASE_URL and one of SERVICE_KEYS (the first that is set),
    and SUPABASE_BUCKET when it is not DEFAULT_BUCKET. STORE=s3 or STORE=supabase says which of two
    is meant. Blanks around a value are dropped; an empty value counts as not set.

    Raises ConfigError for half of a configuration, naming what is missing, and for two.
    """
    values = {name: text for name, value in env.items() if (text := value.strip())}
    named = {"s3": values.keys() & set(_S3), "supabase": values.keys() & set(_SUPABASE)}
    which = values.get("STORE")
    if which not in (None, *named):
        raise ConfigError("STORE must be s3 or supabase")
    if which is None:
        begun = [store for store, names in named.items() if names]
        if not begun:
            return None
        if len(begun) == 2:
            raise ConfigError(
                "variables of two stores are set "
                f"({', '.join(sorted(named['s3'] | named['supabase']))}); "
                "set STORE to s3 or supabase"
            )
        which = begun[0]
    return _s3(values) if which == "s3" else _supabase(values)


def _s3(values: Mapping[str, str]) -> S3Store:
    _require(values, "S3_BUCKET", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY")
    return S3Store(
        values["S3_BUCKET"],
        endpoint_url=values.get("S3_ENDPOINT_URL"),
        region=values.get("S3_REGION"),
        prefix=values.get("S3_PREFIX", ""),
        access_key=values["S3_ACCESS_KEY_ID"],
        secret_key=values["S3_SECRET_ACCESS_KEY"],
    )


def _supabase(values: Mapping[str, str]) -> SupabaseStore:
    keys = [values[name] for name in SERVICE_KEYS if name in values]
    _require(values, "SUPABASE_URL", *(() if keys else (" or ".join(SERVICE_KEYS),)))
    bucket = values.get("SUPABASE_BUCKET", DEFAULT_BUCKET)
    return SupabaseStore(values["SUPABASE_URL"], keys[0], bucket)


def _require(values: Mapping[str, str], *names: str) -> None:
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(f"the store for finished files needs {', '.join(missing)}")
