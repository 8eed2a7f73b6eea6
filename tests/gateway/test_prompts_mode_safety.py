"""In no configuration does a request get text of the other content mode.

The check is written from the definition and not from the code under test: the expected mode is
worked out here, and each text of the configuration carries the mode it belongs to, so that any text
of the other mode in what is sent shows. GATEWAY_MODE_CASES=1000000 runs the full count.
"""

from __future__ import annotations

import os
import random
from itertools import product

import pytest

from gateway.errors import TemplateNotFound
from gateway.prompts import assemble as module
from gateway.prompts.assemble import assemble
from gateway.values.assembly import Assembled, AssembleRequest
from gateway.values.rows import Character, NegativePrompt, Rule, Snapshot, Template
from tests.gateway.snapshots import WordCounters, detect_mark, template, worker_rows

CASES = int(os.environ.get("GATEWAY_MODE_CASES", "20000"))
SEED = 20261126

MODES = ("sfw", "nsfw")
TARGETS = ("sdxl", "wan", "universal")
JOBS = ("image", "video", "*")
USES = ("enhancement", "chat")
OTHER = {"sfw": "nsfw", "nsfw": "sfw"}


def mark(mode: str) -> str:
    return f"[text-of-{mode}]"


def all_templates() -> list[Template]:
    made = []
    for id, tuple4 in enumerate(product(TARGETS, JOBS, USES, MODES), 1):
        text = mark(tuple4[3])
        made.append(
            template(
                id,
                tuple4,
                f"system {text} {{{{ character_persona | default('') }}}}",
                user_template=f"{text} {{{{prompt}}}}",
                negative_prompt=text,
            )
        )
    return made


def all_rules() -> list[Rule]:
    made = []
    for id, (mode, slot, kind, shape) in enumerate(
        product(MODES, ("system", "user", "negative"), ("prepend", "append"), (0, 1, 2)), 1
    ):
        match: dict[str, object] = {"content_mode": mode if shape == 0 else [mode]}
        if shape == 2:
            match["target_model"] = ["sdxl", "*"]
        made.append(
            Rule(
                id=id,
                name=f"r{id}",
                rule_type=kind,
                slot=slot,
                body=mark(mode),
                match=match,
                tags=("night",) if shape == 1 else (),
                priority=id % 3,
                is_optional=id % 2 == 0,
            )
        )
    # A rule for one character says nothing of the mode; its text is the character's.
    made.append(
        Rule(
            id=len(made) + 1,
            name="of-nsfw",
            rule_type="append",
            slot="system",
            body=mark("nsfw"),
            match={"character_id": "nsfw"},
        )
    )
    return made


def all_characters() -> list[Character]:
    return [
        Character(
            id=rating,
            name="Mara",
            persona=mark("nsfw") if rating == "nsfw" else "a keeper",
            system_prompt=mark("nsfw") if rating == "nsfw" else "",
            tags=("night",),
            content_rating=rating,
        )
        for rating in MODES
    ]


def all_negatives() -> list[NegativePrompt]:
    return [
        NegativePrompt(id=id, target_model=target, content_mode=mode, negative_prompt=mark(mode))
        for id, (target, mode) in enumerate(product(("sdxl", "wan", "*"), MODES), 1)
    ]


class Generator:
    """Random configurations and requests of one seed. Changes with every draw; one test's own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.templates = all_templates()
        self.rules = all_rules()
        self.characters = tuple(all_characters())
        self.negatives = all_negatives()
        self.rows = worker_rows()

    def draw(self) -> tuple[Snapshot, AssembleRequest]:
        rng = self.random
        # How full a configuration is, from nearly nothing to nearly all; the case that matters is
        # a tuple that is there in the other mode only.
        kept = rng.random()
        templates = [one for one in self.templates if rng.random() < kept]
        rules = [one for one in self.rules if rng.random() < 0.25]
        rules.sort(key=lambda one: (one.priority, one.id))
        snapshot = Snapshot(
            revision=1,
            templates=tuple(templates),
            rules=tuple(rules),
            characters=self.characters,
            negatives=tuple(one for one in self.negatives if rng.random() < 0.5),
            **self.rows,
        )
        pick = rng.choice
        request = AssembleRequest(
            prompt=pick(("a harbour", "a harbour [x]")),
            target_model=pick(("sdxl", "wan", "flux")),
            job_type=pick(("image", "video", "chat")),
            use_case=pick(USES),
            explicit_mode=pick((None, None, "sfw", "nsfw")),
            user_mode=pick((None, None, "sfw", "nsfw")),
            may_use_nsfw=rng.random() < 0.6,
            character_id=pick((None, None, "sfw", "nsfw")),
            tags=pick(((), ("night",))),
            quality=pick(("fast", "high")),
        )
        return snapshot, request


def mode_by_definition(request: AssembleRequest) -> tuple[str, str]:
    """explicit > user setting > character rating > detector; the stricter where a user may not."""
    said = {
        "explicit": request.explicit_mode,
        "user_setting": request.user_mode,
        "character": request.character_id,  # here a character's id is its rating
        "detected": "nsfw" if "[x]" in request.prompt else "sfw",
    }
    source = next(name for name, mode in said.items() if mode is not None)
    mode = said[source]
    if not request.may_use_nsfw:
        mode = "sfw"
    assert mode is not None
    return mode, source


def may_serve(snapshot: Snapshot, request: AssembleRequest, mode: str) -> list[Template]:
    """Templates that may serve the request: its tuple, or a universal one."""
    return [
        one
        for one in snapshot.templates
        if one.is_active
        and one.content_mode == mode
        and one.use_case == request.use_case
        and (
            (one.target_model, one.job_type) == (request.target_model, request.job_type)
            or (one.target_model == "universal" and one.job_type in (request.job_type, "*"))
        )
    ]


def crossed(
    snapshot: Snapshot, request: AssembleRequest, assembled: Assembled | None
) -> str | None:
    """What is wrong, None if nothing is. assembled: None where no template was found."""
    mode, source = mode_by_definition(request)
    allowed = may_serve(snapshot, request, mode)
    if assembled is None:
        return "a template was there and was not found" if allowed else None
    if assembled.template not in allowed:
        return "served by a template of another mode or tuple"
    if (assembled.content_mode, assembled.mode_source) != (mode, source):
        return "the mode, or who said it, is another"
    sent = [one.content for one in assembled.messages] + [assembled.negative]
    if any(mark(OTHER[mode]) in text for text in sent):
        return "a text of the other mode is sent"
    return None


@pytest.mark.timeout(4 * 3600)  # the full count takes minutes
def test_no_generated_configuration_crosses_the_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The word check is half of the time and says nothing of modes; it has tests of its own.
    monkeypatch.setattr(module, "refusal", lambda texts: None)
    generator = Generator(SEED)
    counters = WordCounters()
    outcomes = {"served": 0, "stopped": 0, "stopped_beside_the_other_mode": 0, "overruled": 0}
    wrong: list[tuple[int, str]] = []

    for case in range(CASES):
        snapshot, request = generator.draw()
        assembled: Assembled | None
        try:
            assembled = assemble(snapshot, request, counters, detect=detect_mark)
            outcomes["served"] += 1
            outcomes["overruled"] += assembled.trace[0].outcome == "overruled"
        except TemplateNotFound:
            assembled = None
            outcomes["stopped"] += 1
            mode, _ = mode_by_definition(request)
            if may_serve(snapshot, request, OTHER[mode]):
                outcomes["stopped_beside_the_other_mode"] += 1
        counters.asked.clear()
        fault = crossed(snapshot, request, assembled)
        if fault is not None:
            wrong.append((case, fault))

    assert wrong == []
    assert min(outcomes.values()) > CASES // 100, outcomes


def test_the_check_sees_a_template_of_the_other_mode() -> None:
    """The check itself must be able to fail: here a swap is made by hand."""
    snapshot = Snapshot(revision=1, templates=tuple(all_templates()), **worker_rows())
    request = AssembleRequest(
        prompt="a harbour", target_model="sdxl", job_type="image", explicit_mode="sfw"
    )
    swapped = AssembleRequest(
        prompt="a harbour", target_model="sdxl", job_type="image", explicit_mode="nsfw"
    )

    assembled = assemble(snapshot, swapped, WordCounters(), detect=detect_mark)

    assert crossed(snapshot, swapped, assembled) is None
    assert crossed(snapshot, request, assembled) is not None
    assert crossed(snapshot, request, None) is not None
