"""Versions of installed distributions."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

# Read once: each takes a millisecond to parse, and every phase of a job asks for some.
version_of = cache(version)


def computing() -> dict[str, str]:
    """Of the libraries that compute: another version may round another way, or hold other
    tensors."""
    return {name: version_of(name) for name in ("torch", "diffusers", "transformers")}
