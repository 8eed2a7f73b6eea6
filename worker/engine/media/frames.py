"""Pictures that a film is made with, as VACE takes them: a source video, its mask, references.

As its authors do it (vace/annotators/frameref.py and vace/models/wan/wan_vace.py of
github.com/ali-vilab/VACE): given frames stand at their places in a video that is grey elsewhere,
and the mask is 0 where a frame is kept and 1 where one is to be made. A reference is what the film
shows and no frame of it; it lies whole on white, as large as it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from worker.engine.media.pictures import Picture, centred, opened, resized
from worker.errors import InvalidRequest
from worker.protocol.messages import Reference, RenderParams

# Which pictures a mode takes, by role.
ROLES: dict[str, tuple[str, ...]] = {
    "text": (),
    "single": ("image",),
    "start": ("first",),
    "end": ("last",),
    "both": ("first", "last"),
}
PLACES = {"first": 0, "last": -1}  # of a given frame; the role "image" is a reference
# Of 0 to 1. The VAE reads -1 to 1, where this is exactly the 0 of VACE's own grey, 127.5; the 128
# that a picture file can hold is not.
GREY = 0.5


@dataclass(frozen=True, slots=True)
class Given:
    """A job's pictures, in the film's size, and what the job's receipt says of them."""

    receipt: dict[str, Any]
    frames: dict[int, Image.Image] = field(default_factory=dict)  # by place in the film
    references: tuple[Image.Image, ...] = ()

    def arguments(self, frames: int) -> dict[str, Any]:
        """Of WanVACEPipeline's call, for a film of so many frames; none where nothing is given.

        video: (1, frames, 3, height, width), mask: (1, frames, 1, height, width); 0 to 1.
        """
        made: dict[str, Any] = {}
        if self.references:
            made["reference_images"] = [*self.references]
        if self.frames:
            width, height = next(iter(self.frames.values())).size
            made["video"] = torch.full((1, frames, 3, height, width), GREY)
            made["mask"] = torch.ones(1, frames, 1, height, width)
            for place, picture in self.frames.items():
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
                made["video"][0, place] = pixels / 255
                made["mask"][0, place] = 0
        return made


def given_pictures(params: RenderParams, references: Sequence[Reference]) -> Given:
    """Read the pictures of a job and bring them to its size.

    A frame is cut to the film's proportions around its middle; a reference is not cut. Raises
    InvalidRequest when they are not those of the job's mode, and for one that cannot be read.
    """
    wanted, sent = ROLES[params.mode], sorted(one.role for one in references)
    if sent != sorted(wanted):
        raise InvalidRequest(
            f"mode {params.mode} takes the pictures {', '.join(wanted) or 'none'}; "
            f"the job came with {', '.join(sent) or 'none'}"
        )
    if not references:
        return Given({})
    made = [
        centred(one, params.width, params.height)
        if one.role in PLACES
        else on_white(opened(one), params.width, params.height)
        for one in references
    ]
    roles = [one.role for one in references]
    return Given(
        {"reference_mode": params.mode, "references": [one.told for one in made]},
        {PLACES[role]: one.pixels for role, one in zip(roles, made, strict=True) if role in PLACES},
        tuple(one.pixels for role, one in zip(roles, made, strict=True) if role not in PLACES),
    )


def on_white(picture: Picture, width: int, height: int) -> Picture:
    """The whole picture, as large as it fits, in the middle of a white one of this size."""
    sides = picture.pixels.size
    scale = min(width / sides[0], height / sides[1])
    fitted = [max(1, round(side * scale)) for side in sides]
    small = resized(picture, fitted[0], fitted[1], Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (width, height), "white")
    ground.paste(small.pixels, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    box = {"left": 0, "top": 0, "width": sides[0], "height": sides[1]}
    return Picture(ground, small.told | {"crop": box, "resize_policy": "fit_on_white"})
