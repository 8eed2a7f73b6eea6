"""Pictures that came with a job, brought to the size that is asked for: cut around the middle.

Nothing is done to a picture that its receipt does not tell: what was cut off, how it was turned,
what it was laid on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from worker.errors import InvalidRequest
from worker.protocol.messages import Reference


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and what the receipt says of it."""

    pixels: Image.Image  # RGB
    told: dict[str, Any]


def the_one(references: Sequence[Reference], mode: str) -> Reference:
    """The one picture of a job whose mode works with one. Raises InvalidRequest."""
    roles = [one.role for one in references]
    if roles != ["image"]:
        raise InvalidRequest(
            f"mode {mode} takes one picture, for image; the job came with "
            f"{', '.join(sorted(roles)) or 'none'}"
        )
    return references[0]


def centred(reference: Reference, width: int, height: int) -> Picture:
    """The largest middle part that has the proportions of width x height, resized to them, in
    pixels. Raises InvalidRequest, as `opened`."""
    return resized(cut(opened(reference), width, height), width, height, Image.Resampling.LANCZOS)


def cut(picture: Picture, width: int, height: int) -> Picture:
    """The largest middle part with the proportions of width x height."""
    left, top, right, bottom = centre_of(picture.pixels.size, (width, height))
    box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return Picture(
        picture.pixels.crop((left, top, right, bottom)),
        picture.told | {"crop": box, "resize_policy": "center_crop"},
    )


def resized(picture: Picture, width: int, height: int, way: Image.Resampling) -> Picture:
    """In pixels; a picture of that size stays as it is."""
    pixels = picture.pixels
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), way)
    return Picture(pixels, picture.told | {"resized": {"width": width, "height": height}})


def opened(reference: Reference) -> Picture:
    """The picture upright and in RGB, what is transparent on white.

    Numbers are taken as they are, whatever colour profile the file has. Of a moving picture it is
    the first frame. Raises InvalidRequest for a file that cannot be read, and for numbers that
    have no range to scale from (32 bits, floating point).
    """
    told: dict[str, Any] = {"role": reference.role, "sha256": reference.sha256}
    try:
        with Image.open(reference.file) as file:
            file.load()
            picture: Image.Image = file
            if (turned := file.getexif().get(ExifTags.Base.Orientation, 1)) in range(2, 9):
                picture = ImageOps.exif_transpose(file)
                told["orientation"] = turned
            if getattr(file, "n_frames", 1) > 1:
                told["frame"] = {"used": 0, "of": file.n_frames}  # type: ignore[attr-defined]
            rgb, more = _in_rgb(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise InvalidRequest(
            f"the picture for {reference.role} (sha256 {reference.sha256[:12]}) cannot be read: "
            f"{type(exc).__name__}; send a whole PNG, JPEG or WebP"
        ) from exc
    return Picture(rgb, told | {"width": rgb.width, "height": rgb.height} | more)


def centre_of(sides: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest middle part (left, top, right, bottom) of a picture of `sides` that has the
    proportions of `wanted`; (width, height) each, in pixels."""
    width, height = sides
    inner_width = min(width, max(1, round(height * wanted[0] / wanted[1])))
    inner_height = min(height, max(1, round(width * wanted[1] / wanted[0])))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _in_rgb(picture: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    """The picture in RGB, and what of that changes its numbers. Raises InvalidRequest, and
    ValueError as Pillow does."""
    if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts off all above 255
        shades = np.asarray(picture).astype(np.float32) / 257
        grey = Image.fromarray(shades.round().astype(np.uint8))
        return grey.convert("RGB"), {"bits": {"sent": 16, "used": 8}}
    if picture.mode in ("I", "F"):
        raise InvalidRequest(
            f"the picture has numbers of 32 bits (Pillow's mode {picture.mode}), and nothing says "
            "which of them is white; send 8 or 16 bits a channel"
        )
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        alpha = clear.getchannel("A")
        white = Image.new("RGB", clear.size, "white")
        white.paste(clear, mask=alpha)
        opaque = alpha.getextrema()[0] == 255
        return white, {} if opaque else {"transparent": "laid_on_white"}
    if picture.mode == "CMYK":  # by Pillow's plain formula
        return picture.convert("RGB"), {"colours": {"sent": "CMYK", "used": "RGB"}}
    return picture.convert("RGB"), {}
