"""Versions of installed distributions."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

# Read once: each takes a millisecond to parse, and every phase of a job asks for some.
version_of = cache(version)
