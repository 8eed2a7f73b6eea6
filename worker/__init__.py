"""Verbatim, a GPU inference worker that runs exactly what arrives. See docs/architecture.md."""

__version__ = "0.1.0"
