"""Silences what the model libraries print at people who look at a progress bar."""

from __future__ import annotations


def quiet_libraries() -> None:
    """No progress bars and no advice from transformers and diffusers; errors still show."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
