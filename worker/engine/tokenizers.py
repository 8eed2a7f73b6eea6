"""Says how an image model's tokenizers count, for processes without torch and its libraries.

`python -m worker.engine.tokenizers FOLDER` writes them as JSON, by name, as the library makes them
of their files: it builds its own from a vocabulary, and adds special tokens that it finds in any
text. worker/vram/tokenizers.py starts it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

NAMES = ("tokenizer", "tokenizer_2")


def exported(folder: Path) -> dict[str, dict[str, object]]:
    """By name: `limit`, tokens that the encoder reads at once, and `json`, as the tokenizers
    library takes it. folder: of a pipeline."""
    import transformers

    index = json.loads((folder / "model_index.json").read_bytes())
    made: dict[str, dict[str, object]] = {}
    for name in NAMES:
        kind = getattr(transformers, index[name][1])
        one = kind.from_pretrained(folder / name, local_files_only=True)
        made[name] = {"limit": one.model_max_length, "json": one.backend_tokenizer.to_str()}
    return made


def main() -> int:
    logging.disable(logging.WARNING)  # the libraries' remarks on what they have not found
    os.nice(10)  # somebody waits for it, and others for what they asked before
    print(json.dumps(exported(Path(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
