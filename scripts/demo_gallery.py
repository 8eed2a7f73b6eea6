"""Ask a running demo daemon for an answer, pictures and a clip; write them as small files.

    ./scripts/serve                       in one terminal
    python scripts/demo_gallery.py        in another: docs/images/, which the README shows

Everything goes through HTTP, as any client's request would. The same seeds give the same pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import httpx
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
SYSTEM = "Rewrite the prompt as a detailed photographic image prompt in at most 40 words."
PROMPT = "a green star on a white background"
PICTURES = (
    PROMPT,
    "a large yellow circle on a black background",
    "a purple triangle at the bottom, grey background",
    "an orange square on the left, black background",
    "a red circle on the left and a blue square on the right, white background",
    "a small yellow star above a large green triangle, white background",
)
CLIPS = (
    "a red circle moving right on a white background",
    "a yellow star turning on a black background",
    "a green square rising on a white background",
    "a blue triangle growing on a grey background",
)
WAIT = {"Prefer": "wait=80"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with httpx.Client(timeout=100) as client:
            answer = _ask(client, options.chat)
            pictures = [_picture(client, options.media, text) for text in PICTURES]
            clips = [_clip(client, options.media, text) for text in CLIPS]
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"demo_gallery: {error}; is ./scripts/serve running?", file=sys.stderr)
        return 1
    (options.out / "demo-answer.json").write_text(json.dumps(answer, indent=1) + "\n")
    _grid(pictures).save(options.out / "demo-pictures.png", optimize=True)
    first, *others = (_grid(list(frames)) for frames in zip(*clips, strict=True))
    first.save(
        options.out / "demo-clip.webp",
        save_all=True,
        append_images=others,
        duration=62,  # milliseconds: 16 frames a second
        loop=0,
        quality=80,
    )
    for file in sorted(options.out.glob("demo-*")):
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
    return 0


def _ask(client: httpx.Client, base: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    answer = client.post(f"{base}/enhance", json={"messages": messages, "seed": 7})
    body: dict[str, Any] = answer.json()
    if answer.status_code != 200:
        raise RuntimeError(f"/enhance answered {answer.status_code}: {body.get('error')}")
    return body


def _asset(client: httpx.Client, base: str, body: dict[str, Any]) -> bytes:
    answer = client.post(f"{base}/generate", json=body, headers=WAIT)
    job = answer.json()
    if job.get("status") != "completed":
        raise RuntimeError(f"/generate answered {answer.status_code}: {job.get('error')}")
    return client.get(f"{base}{job['assets'][0]['url']}").content


def _picture(client: httpx.Client, base: str, prompt: str) -> Image.Image:
    content = _asset(client, base, {"type": "sdxl_image_fast", "prompt": prompt, "seed": 1})
    return Image.open(io.BytesIO(content)).convert("RGB")


def _clip(client: httpx.Client, base: str, prompt: str) -> list[Image.Image]:
    content = _asset(client, base, {"type": "video_fast", "prompt": prompt, "seed": 1})
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def _grid(pictures: list[Image.Image], gap: int = 4) -> Image.Image:
    """All in one row."""
    width = sum(one.width for one in pictures) + gap * (len(pictures) - 1)
    grid = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for one in pictures:
        grid.paste(one, (left, 0))
        left += one.width + gap
    return grid


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chat", default="http://127.0.0.1:7861", help="address of the chat port")
    parser.add_argument("--media", default="http://127.0.0.1:7860", help="of the media port")
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "docs" / "images",
        metavar="DIR",
        help="where the files go (default: docs/images)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
