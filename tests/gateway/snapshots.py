"""Builders and strategies of snapshots and requests, and a counter that needs no files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import strategies as st

from gateway.values.assembly import AssembleRequest, Message
from gateway.values.rows import (
    ANY,
    MODES,
    UNIVERSAL,
    Assignment,
    Character,
    CharacterLora,
    LlmModel,
    NegativePrompt,
    ParameterSet,
    Provider,
    Rule,
    Snapshot,
    Template,
    TemplateVersion,
)

TARGETS = ("sdxl", "wan", "qwen_instruct")
JOBS = ("image", "video", "chat")
USES = ("enhancement", "chat")
TIERS = (ANY, "free", "pro")
CHARACTERS = ("mara", "oren")
MODELS = ("qwen_instruct", "mytho", "opus")
TASKS = ("enhancement", "roleplay", ANY)
TAGS = ("portrait", "night", "sea")


@dataclass
class WordCounter:
    """A token is a word between blanks."""

    name: str = "words"
    is_exact: bool = True

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, limit: int) -> str:
        return " ".join(text.split()[:limit])


@dataclass
class WordCounters:
    """The same counter for every name. Keeps the names that were asked for."""

    counter: WordCounter = field(default_factory=WordCounter)
    asked: list[str | None] = field(default_factory=list)

    def of(self, tokenizer: str | None) -> WordCounter:
        self.asked.append(tokenizer)
        return self.counter


@dataclass(frozen=True)
class Found:
    mode: str
    terms: tuple[str, ...] = ()


def detect_mark(text: str) -> Found:
    """Finds nsfw where the text has the mark [x]."""
    return Found("nsfw", ("[x]",)) if "[x]" in text else Found("sfw")


def template(
    id: int = 1,
    tuple4: tuple[str, str, str, str] = ("sdxl", "image", "enhancement", "sfw"),
    system_prompt: str = "You write prompts.",
    *,
    version: int = 1,
    is_active: bool = True,
    name: str | None = None,
    **live: Any,
) -> Template:
    target, job, use, mode = tuple4
    return Template(
        id=id,
        template_name=name or f"t{id}",
        target_model=target,
        job_type=job,
        use_case=use,
        content_mode=mode,
        is_active=is_active,
        live=TemplateVersion(
            id=id * 100 + version,
            version=version,
            system_prompt=system_prompt,
            **{"max_output_tokens": 160, **live},
        ),
    )


def rule(id: int, body: str, **fields: Any) -> Rule:
    values = {"name": f"r{id}", "rule_type": "append", "slot": "system", **fields}
    return Rule(id=id, body=body, **values)


def worker_rows() -> dict[str, Any]:
    """One worker with one model that is the default of chat/enhancement."""
    return {
        "providers": (Provider(id=1, name="worker", kind="worker"),),
        "models": (
            LlmModel(
                id=1,
                provider_id=1,
                external_id="qwen_instruct",
                model_name="Qwen",
                model_key="qwen_instruct",
            ),
        ),
        "assignments": (
            Assignment(
                id=1,
                llm_model_id=1,
                display_name="Qwen",
                model_key="qwen_instruct",
                modality="chat",
                task="enhancement",
                is_default=True,
            ),
        ),
    }


def snapshot(**fields: Any) -> Snapshot:
    """With a worker's rows and one sfw template unless given otherwise."""
    values: dict[str, Any] = {"templates": (template(),), **worker_rows(), **fields}
    values["rules"] = tuple(sorted(values.get("rules", ()), key=lambda one: (one.priority, one.id)))
    return Snapshot(revision=1, **values)


def request(prompt: str = "a harbour at dawn", **fields: Any) -> AssembleRequest:
    values = {
        "target_model": "sdxl",
        "job_type": "image",
        "explicit_mode": "sfw",
        **fields,
    }
    return AssembleRequest(prompt=prompt, **values)


# --- strategies -------------------------------------------------------------------------------
#
# Each draws one number and builds the value from it: a hundred times as fast as drawing fields,
# and a failure names the number that makes it again.

TEXTS = ("sea", "lamp", "{{prompt}}", "{% raw %}", "<lora:x:1>", '"red hat"', "é", "🙂")
BODIES = (
    "Keep the subject.",
    "Light: {{prompt}}",
    "{% if character_name is defined %}As {{character_name}}.{% endif %}",
    "{{ user_name | default('guest') | upper }}",
    "",
    "one two three four five six seven",
)
PARAM_NAMES = ("temperature", "top_p", "seed", "max_tokens", "top_k")
MATCHED = {
    "target_model": TARGETS,
    "job_type": (*JOBS, ANY),
    "content_mode": MODES,
    "quality": ("fast", "high"),
    "character_id": CHARACTERS,
    "user_tier": TIERS,
}
T = TypeVar("T")


class Draw:
    """Random parts of one seed. One test's own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.one = self.random.choice

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def some(self, values: Sequence[T], most: int) -> tuple[T, ...]:
        return tuple(self.random.sample(values, self.random.randint(0, min(most, len(values)))))

    def text(self) -> str:
        return " ".join(self.one(TEXTS) for _ in range(self.random.randint(0, 6)))

    def params(self) -> dict[str, Any]:
        return {name: self.random.randint(-3, 40) for name in self.some(PARAM_NAMES, 3)}

    def match(self) -> dict[str, Any]:
        return {
            key: list(self.some(values, 3)) if self.maybe(0.5) else self.one(values)
            for key, values in MATCHED.items()
            if self.maybe(0.12)
        }


def random_rules(draw: Draw) -> tuple[Rule, ...]:
    made = [
        Rule(
            id=id,
            name=f"r{id}",
            rule_type=draw.one(("prepend", "append")),
            slot=draw.one(("system", "user", "negative")),
            body=draw.one(BODIES),
            match=draw.match(),
            tags=draw.some(TAGS, 2) if draw.maybe(0.3) else (),
            priority=draw.random.randint(-2, 2),
            exclusive_group=draw.one((None, None, "a", "b")),
            max_tokens=draw.one((None, None, 3)),
            is_optional=draw.maybe(0.7),
            is_active=draw.maybe(0.8),
        )
        for id in range(1, draw.random.randint(0, 10) + 1)
    ]
    return tuple(sorted(made, key=lambda one: (one.priority, one.id)))


def random_templates(draw: Draw) -> tuple[Template, ...]:
    """At most one active row of a tuple, as the table's unique index has it."""
    made: list[Template] = []
    taken: set[tuple[str, str, str, str]] = set()
    for id in range(1, draw.random.randint(1, 24) + 1):
        tuple4 = (
            draw.one((*TARGETS, UNIVERSAL, UNIVERSAL)),
            draw.one((*JOBS, ANY, ANY)),
            draw.one(USES),
            draw.one(MODES),
        )
        is_active = tuple4 not in taken and draw.maybe(0.8)
        if is_active:
            taken.add(tuple4)
        made.append(
            template(
                id,
                tuple4,
                draw.one(BODIES),
                version=draw.random.randint(1, 3),
                is_active=is_active,
                user_template=draw.one(("{{prompt}}", "Prompt: {{ prompt }}")),
                negative_prompt=draw.one(("", "blurry")),
                max_output_tokens=draw.random.randint(1, 60),
                params=draw.params(),
            )
        )
    return tuple(made)


def random_characters(draw: Draw) -> tuple[Character, ...]:
    return tuple(
        Character(
            id=id,
            name=id.title(),
            persona=draw.one(("", "A keeper of lamps.")),
            system_prompt=draw.one(("", "Speak in short lines. {{prompt}}")),
            tags=draw.some(TAGS, 2),
            content_rating=draw.one(MODES),
            defaults=draw.params(),
            card=draw.one(
                ({}, {"character_goals": "find the sea", "voice_examples": ["Aye.", "No."]})
            ),
            loras=draw.one(
                ((), (CharacterLora(lora_ref="m", weight=0.5, trigger_words=("mara_v2",)),))
            ),
        )
        for id in CHARACTERS
    )


def random_parameters(draw: Draw) -> tuple[ParameterSet, ...]:
    """At most one row of a case, as the table's unique key has it."""
    cases = {
        (
            draw.one((ANY, *MODELS)),
            draw.one((ANY, *JOBS)),
            draw.one((ANY, "fast", "high")),
            draw.one(TIERS),
            draw.one((ANY, *CHARACTERS)),
        ): None
        for _ in range(draw.random.randint(0, 30))
    }
    return tuple(
        ParameterSet(
            id=id,
            model_key=model_key,
            job_type=job_type,
            profile=profile,
            user_tier=user_tier,
            character_id=character_id,
            params=draw.params(),
        )
        for id, (model_key, job_type, profile, user_tier, character_id) in enumerate(cases, 1)
    )


def random_assignments(draw: Draw) -> tuple[Assignment, ...]:
    made: list[Assignment] = []
    defaults: set[str] = set()
    for task in TASKS:
        for model_id, key in enumerate(MODELS, 1):
            if draw.maybe(0.3):
                continue
            is_active = draw.maybe(0.8)
            is_default = is_active and task not in defaults and draw.maybe(0.5)
            if is_default:
                defaults.add(task)
            made.append(
                Assignment(
                    id=len(made) + 1,
                    llm_model_id=model_id,
                    display_name=key,
                    model_key=key,
                    modality="chat",
                    task=task,
                    is_default=is_default,
                    is_active=is_active,
                    priority=draw.random.randint(0, 3),
                )
            )
    return tuple(made)


def random_snapshot(seed: int) -> Snapshot:
    draw = Draw(seed)
    return Snapshot(
        revision=draw.random.randint(1, 99),
        templates=random_templates(draw),
        rules=random_rules(draw),
        providers=tuple(
            Provider(
                id=id,
                name=name,
                kind=kind,
                base_url=None if kind == "worker" else "https://models.example/v1",
                is_active=draw.maybe(0.8),
            )
            for id, name, kind in ((1, "worker", "worker"), (2, "open", "openai"))
        ),
        models=tuple(
            LlmModel(
                id=id,
                provider_id=draw.one((1, 2)),
                external_id=key,
                model_name=key.title(),
                model_key=key,
                capabilities=draw.one(({}, {"context_length": 60}, {"context_length": 80})),
                is_active=draw.maybe(0.8),
                missing_since=draw.one((None, None, None, "2026-11-01T00:00:00+00:00")),
            )
            for id, key in enumerate(MODELS, 1)
        ),
        assignments=random_assignments(draw),
        parameters=random_parameters(draw),
        characters=random_characters(draw),
        negatives=tuple(
            NegativePrompt(
                id=id,
                target_model=draw.one((*TARGETS, ANY)),
                content_mode=draw.one(MODES),
                generation_mode=draw.one(("txt2img", "i2i")),
                negative_prompt=f"negative {id}",
                priority=draw.random.randint(0, 3),
                is_active=draw.maybe(0.7),
            )
            for id in range(1, draw.random.randint(0, 8) + 1)
        ),
    )


def random_request(seed: int) -> AssembleRequest:
    draw = Draw(seed)
    return AssembleRequest(
        prompt=draw.text() + draw.one(("", " [x]")),
        target_model=draw.one((*TARGETS, "unheard_of")),
        job_type=draw.one(JOBS),
        use_case=draw.one(USES),
        explicit_mode=draw.one((None, *MODES)),
        user_mode=draw.one((None, *MODES)),
        may_use_nsfw=draw.maybe(0.7),
        character_id=draw.one((None, *CHARACTERS)),
        quality=draw.one(("fast", "high")),
        user_tier=draw.one(TIERS),
        tags=draw.some(TAGS, 2),
        variables={name: draw.text() for name in draw.some(("user_name", "scene_context"), 2)},
        history=tuple(
            Message(draw.one(("user", "assistant")), draw.text())
            for _ in range(draw.random.randint(0, 3))
        ),
        system_override=draw.one((None, None, None, "Own words. {{prompt}}")),
        generation_mode=draw.one(("txt2img", "i2i")),
        user_negative=draw.text(),
        model=draw.one((None, *MODELS, "unheard_of")),
        task=draw.one(("enhancement", "enhancement", "roleplay", "")),
        params=draw.params() if draw.maybe(0.5) else {},
        user_id=draw.one((None, "u1")),
    )


SEEDS = st.integers(0, 2**40)


def snapshots() -> st.SearchStrategy[Snapshot]:
    """Any configuration that the tables allow, rows on and off, with two providers."""
    return SEEDS.map(random_snapshot)


def requests() -> st.SearchStrategy[AssembleRequest]:
    return SEEDS.map(random_request)


def rules() -> st.SearchStrategy[tuple[Rule, ...]]:
    return SEEDS.map(lambda seed: random_rules(Draw(seed)))


def parameter_sets() -> st.SearchStrategy[tuple[ParameterSet, ...]]:
    return SEEDS.map(lambda seed: random_parameters(Draw(seed)))


def params() -> st.SearchStrategy[dict[str, Any]]:
    return SEEDS.map(lambda seed: Draw(seed).params())
