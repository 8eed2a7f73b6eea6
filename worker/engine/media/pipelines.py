"""What a diffusers pipeline has to be told when its parts come and go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch


def computing_on(pipeline: Any, device: torch.device) -> Any:
    """The same pipeline, which takes `device` for its own whatever its parts are on: by itself it
    asks its first part, and that may be parked."""
    kind = type(pipeline)
    own = {"_execution_device": property(lambda _: device), "__module__": kind.__module__}
    pipeline.__class__ = type(kind.__name__, (kind,), own)
    return pipeline


def module_configs(pipeline: Any, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json of each part, as it was loaded."""
    found = {}
    for name in parts:
        config = getattr(pipeline, name).config
        if hasattr(config, "to_json_string"):  # of transformers
            found[name] = json.loads(config.to_json_string(use_diff=False))
        else:  # of diffusers, a frozen dictionary
            found[name] = {
                key: value for key, value in dict(config).items() if key != "_name_or_path"
            } | {"_class_name": type(getattr(pipeline, name)).__name__}
    return found
