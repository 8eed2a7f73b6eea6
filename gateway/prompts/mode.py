"""Which of the two content modes a request is resolved in, and who said so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gateway.errors import Invalid
from gateway.values.assembly import AssembleRequest, Step
from gateway.values.rows import MODES, NSFW, SFW, Character


class Detection(Protocol):
    """What a detector found in a text."""

    @property
    def mode(self) -> str: ...

    @property
    def terms(self) -> tuple[str, ...]: ...


class Detector(Protocol):
    def __call__(self, text: str, /) -> Detection: ...


@dataclass(frozen=True, slots=True)
class Mode:
    content_mode: str  # sfw | nsfw
    source: str  # explicit | user_setting | character | detected
    step: Step


def decide_mode(request: AssembleRequest, character: Character | None, detect: Detector) -> Mode:
    """The first of these that says anything: the request, the user's own setting, the character's
    rating, the detector. A user who may not use nsfw gets sfw, whoever spoke.

    The detector is asked only when nothing else spoke; it picks rows and never changes a text.
    Raises Invalid for a mode that is neither of the two.
    """
    detail: dict[str, object] = {}
    if request.explicit_mode is not None:
        said, source = _known(request.explicit_mode), "explicit"
        why = f"the request says {said}"
        if character is not None and character.content_rating != said:
            why += f", which goes before the character's rating {character.content_rating}"
    elif request.user_mode is not None:
        said, source = _known(request.user_mode), "user_setting"
        why = f"the user's own setting is {said}"
    elif character is not None:
        said, source = _known(character.content_rating), "character"
        why = f"the character is rated {said}"
    else:
        detection = detect(request.prompt)
        said, source = _known(detection.mode), "detected"
        why = f"nothing was said, and the detector found {len(detection.terms)} terms"
        detail["terms"] = len(detection.terms)
    mode = said if request.may_use_nsfw else SFW
    if mode != said:
        why += f"; this user may not use {NSFW}"
        detail["overruled"] = said
    step = Step(
        step="mode",
        outcome="overruled" if mode != said else "chosen",
        why=why,
        detail={"content_mode": mode, "source": source, **detail},
    )
    return Mode(mode, source, step)


def _known(mode: str) -> str:
    if mode not in MODES:
        raise Invalid(f"the content mode is none of {', '.join(MODES)}")
    return mode
