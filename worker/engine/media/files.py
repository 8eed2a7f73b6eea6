"""Finished pictures and videos as files, with thumbnails and checksums."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from worker.modelfiles import file_sha256
from worker.protocol.messages import AssetFile

THUMBNAIL_EDGE = 256  # pixels, the longer side; docs/http-api.md#assets
THUMBNAIL_QUALITY = 85
# x264's constant rate factor: 18 is visually close to lossless (x264 documentation, "sane range
# 17 to 28").
VIDEO_CRF = "18"

Frames = npt.NDArray[np.uint8]  # (frames, height, width, 3) RGB


def save_image(folder: Path, index: int, image: Image.Image, seed: int) -> AssetFile:
    """Write `{index}.png` and its thumbnail; the pixels of the PNG are exactly the image's."""
    return _save(
        folder,
        index,
        suffix="png",
        write=lambda target: image.save(target, format="PNG"),
        preview=image,
        type="image",
        mime_type="image/png",
        width=image.width,
        height=image.height,
        seed=seed,
    )


def save_video(folder: Path, frames: Frames, fps: int, seed: int) -> AssetFile:
    """Write `0.mp4` (H.264, yuv420p, playable from its first bytes) and the middle frame's
    thumbnail.

    frames: (frames, height, width, 3) RGB, both sides even.
    """
    count, height, width, _ = frames.shape
    return _save(
        folder,
        0,
        suffix="mp4",
        write=lambda target: _write_mp4(target, frames, fps),
        preview=Image.fromarray(frames[count // 2]),
        type="video",
        mime_type="video/mp4",
        width=width,
        height=height,
        seed=seed,
        frames=count,
        fps=fps,
        duration_s=round(count / fps, 4),
    )


def _save(
    folder: Path,
    index: int,
    *,
    suffix: str,
    write: Callable[[Path], None],
    preview: Image.Image,
    **facts: Any,
) -> AssetFile:
    name, thumbnail = f"{index}.{suffix}", f"{index}.thumb.webp"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / name)
    small = preview.copy()
    small.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE), Image.Resampling.LANCZOS)
    small.save(folder / thumbnail, format="WEBP", quality=THUMBNAIL_QUALITY)
    return AssetFile(
        file=name,
        thumbnail=thumbnail,
        size_bytes=(folder / name).stat().st_size,
        sha256=file_sha256(folder / name),
        **facts,
    )


def _write_mp4(target: Path, frames: Frames, fps: int) -> None:
    _, height, width, _ = frames.shape
    # faststart: the index comes first, so that a browser plays before it has the whole file.
    with av.open(str(target), mode="w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        # Without it x264 picks its arithmetic by where memory happens to lie, and the same frames
        # gave two to ten different files in 150 tries: a repeated job could not be told by its
        # hash.
        stream.options = {"crf": VIDEO_CRF, "x264-params": "cpu-independent=1"}
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
