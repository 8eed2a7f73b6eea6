"""Whether demo-chat's answers are right: counted by rules, on content that training never saw.

`judge` looks at one answer; `evaluate_chat` asks a model folder for hundreds of them, once taking
the likeliest token always and once drawing as the worker does by default.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from demo_models.chat_training import Encoder
from demo_models.conversation import (
    DAYLIGHT,
    EXCLUSIVE,
    OPENINGS,
    Example,
    Prompt,
    evaluation_example,
    word_count,
)
from demo_models.scenes import CAMERAS, FILMS, LIGHTS, MOTION_WORDS, QUALITIES
from demo_models.small_talk import UNKNOWN_SIGN

MAX_TOKENS = 200  # /enhance's default
TEMPERATURE, TOP_P = 0.7, 0.9  # the worker's defaults
BATCH = 50

DETAILS = frozenset((*LIGHTS, *CAMERAS, *QUALITIES, *FILMS))
IMAGE_WORDS = frozenset(
    "photograph photo photography lens focus depth close-up angle resolution detailed view"
    " composition".split()
)
VIDEO_WORDS = frozenset("camera shot motion movement frames take pacing speed cinematic".split())
_MOTIONS = {phrase: motion for motion, phrases in MOTION_WORDS.items() for phrase in phrases}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right about one answer to an enhancement."""

    keeps: bool  # every thing of the prompt with its number and colour
    copies: bool  # the prompt's text letter by letter, which is more
    style: bool  # image or video words, as asked, and none of the other
    ended: bool  # by itself
    contradictions: tuple[str, ...]
    repeats: bool  # a detail twice
    in_budget: bool | None  # None where no budget was asked


def judge(example: Example, answer: str, *, ended: bool = True) -> Verdict:
    """example: an enhancement."""
    prompt = example.prompt
    assert prompt is not None and example.kind != "chat"
    parts = added(prompt, answer)
    return Verdict(
        keeps=keeps(prompt, answer),
        copies=prompt.text.lower() in answer.lower(),
        style=style_of(parts) == example.kind,
        ended=ended,
        contradictions=tuple(contradictions(prompt, example.kind, parts)),
        repeats=max(Counter((*parts, *prompt.details)).values(), default=1) > 1,
        in_budget=None if example.budget is None else word_count(answer) <= example.budget,
    )


def keeps(prompt: Prompt, answer: str) -> bool:
    """Whether every thing is there, with its number and colour, as often as the prompt has it."""
    wanted = Counter(one.lower() for one in prompt.keep)
    return all(_occurrences(thing, answer) >= count for thing, count in wanted.items())


def added(prompt: Prompt, answer: str) -> list[str]:
    """What the answer has besides the prompt's text, in lower case, split at commas.

    Where the text is not copied as it is, its words are taken out one by one. A full stop says
    nothing: an answer may keep the one that ends the user's message.
    """
    rest, text = answer.lower().strip().removesuffix("."), prompt.text.lower()
    if text in rest:
        rest = rest.replace(text, ",", 1)
        return [part for part in (part.strip(" .") for part in rest.split(",")) if part]
    words = Counter(re.findall(r"[^\s,]+", text))
    found = []
    for part in rest.split(","):
        left = [part.strip()] if part.strip() in DETAILS else []
        for word in [] if left else part.split():
            if words[word]:
                words[word] -= 1
            else:
                left.append(word)
        found.append(" ".join(left))
    return [part for part in found if part]


def style_of(parts: Iterable[str]) -> Literal["image", "video"] | None:
    """By the words that were added; None when there are none, or both kinds."""
    words = {word for part in parts for word in part.split()}
    image, video = bool(words & IMAGE_WORDS), bool(words & VIDEO_WORDS)
    if image == video:
        return None
    return "image" if image else "video"


def contradictions(prompt: Prompt, kind: str, parts: Sequence[str]) -> list[str]:
    """What was added and should not have been.

    Only details without colour, number, thing and place may be added, one motion to what does not
    move yet, and "a photograph of".
    """
    found = []
    motions = [part for part in parts if part in _MOTIONS]
    if motions and (prompt.moves or kind == "image"):
        found.append(f"adds {motions[0]}")
    if len(motions) > 1:
        found.append(f"{motions[0]} and {motions[1]}")
    things = prompt.description.things if prompt.description else ()
    if len(things) == 1 and things[0].shape == "circle":
        found += [f"a circle {one}" for one in motions if _MOTIONS[one] == "turning"]
    details = {*parts, *prompt.details} & DETAILS
    if prompt.night:
        found += [f"{one} at night" for one in parts if one in DAYLIGHT]
    for group in EXCLUSIVE:
        if len(details & group) > 1:
            found.append(" and ".join(sorted(details & group)))
    openings = {opening.lower().strip() for opening in OPENINGS}
    fine = DETAILS | _MOTIONS.keys() | openings
    found += [f"adds {part}" for part in parts if part not in fine]
    return found


def answers_right(example: Example, answer: str) -> bool:
    """example: a chat. Whether the answer is one to that question."""
    text = answer.lower()
    if UNKNOWN_SIGN in text and UNKNOWN_SIGN not in example.signs:
        return False
    return any(sign in text for sign in example.signs)


def _occurrences(thing: str, answer: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(thing)}(?!\w)", answer.lower()))


# --- a model's answers ---------------------------------------------------------------------------


def evaluate_chat(folder: Path, count: int = 500, seed: int = 2024) -> dict[str, Any]:
    """Figures of the model in `folder`: shares of right answers, and examples of wrong ones.

    count: enhancements, half for images and half for video; besides them, count / 2 chats.
    """
    chance = random.Random(seed)
    examples = [evaluation_example(chance, "video" if i % 2 else "image") for i in range(count)]
    chats = [evaluation_example(chance, "chat") for _ in range(count // 2)]
    figures: dict[str, Any] = {"prompts": count, "chats": len(chats), "seed": seed}
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        answers = answer_all(folder, [*examples, *chats], temperature=temperature, seed=seed)
        verdicts = [
            judge(example, text, ended=ended)
            for example, (text, ended) in zip(examples, answers[:count], strict=True)
        ]
        right = [
            answers_right(chat, text) and ended
            for chat, (text, ended) in zip(chats, answers[count:], strict=True)
        ]
        figures[name] = {
            **shares(verdicts),
            **{
                f"keeps_{group}": _share(
                    verdict.keeps
                    for example, verdict in zip(examples, verdicts, strict=True)
                    if group_of(example) == group
                )
                for group in ("scenes", "wider", "unknown")
            },
            "chat_right": _share(right),
            "failures": [
                _failure(example, text, verdict)
                for example, (text, _), verdict in zip(examples, answers, verdicts, strict=False)
                if not is_right(verdict)
            ],
            "chat_failures": [
                {"intent": chat.intent, "asked": chat.messages[-1].content, "answer": text}
                for chat, (text, _), good in zip(chats, answers[count:], right, strict=True)
                if not good
            ],
        }
    return figures


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The shares of right answers, 0 .. 1."""
    budgets = [verdict.in_budget for verdict in verdicts if verdict.in_budget is not None]
    return {
        "keeps": _share(verdict.keeps for verdict in verdicts),
        "copies": _share(verdict.copies for verdict in verdicts),
        "style": _share(verdict.style for verdict in verdicts),
        "ended": _share(verdict.ended for verdict in verdicts),
        "no_contradiction": _share(not verdict.contradictions for verdict in verdicts),
        "no_repeat": _share(not verdict.repeats for verdict in verdicts),
        "in_budget": _share(budgets),
    }


def is_right(verdict: Verdict) -> bool:
    """Everything that has a goal, at once."""
    return (
        verdict.keeps
        and verdict.style
        and verdict.ended
        and not verdict.contradictions
        and verdict.in_budget is not False
    )


def group_of(example: Example) -> str:
    """What an enhancement's prompt is about."""
    assert example.prompt is not None
    if example.prompt.description is not None:
        return "scenes"
    return "unknown" if example.prompt.fits == "copy" else "wider"


def answer_all(
    folder: Path, examples: Sequence[Example], *, temperature: float, seed: int
) -> list[tuple[str, bool]]:
    """Answers of at most MAX_TOKENS tokens, and whether each ended by itself.

    temperature: 0 takes the likeliest token; else top_p is TOP_P, as the worker has it by default.
    """
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    questions = [encoder.question(example) for example in examples]
    answers: list[tuple[str, bool]] = [("", False)] * len(questions)
    # Questions of like length together, so that little is padding.
    order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
    draw: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        draw = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
    torch.manual_seed(seed)
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        longest = max(len(questions[index]) for index in group)
        padding = [longest - len(questions[index]) for index in group]
        ids = torch.tensor(
            [
                [tokenizer.pad_token_id] * left + questions[index]
                for index, left in zip(group, padding, strict=True)
            ]
        )
        mask = (torch.arange(longest)[None] >= torch.tensor(padding)[:, None]).long()
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, **draw
        )[:, longest:]
        for index, row in zip(group, made.tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            text = row[: row.index(tokenizer.eos_token_id)] if ended else row
            answers[index] = (tokenizer.decode(text), ended)
    return answers


def _failure(example: Example, answer: str, verdict: Verdict) -> dict[str, Any]:
    wrong = [
        name
        for name, good in (
            ("keeps", verdict.keeps),
            ("style", verdict.style),
            ("ended", verdict.ended),
            ("in_budget", verdict.in_budget is not False),
        )
        if not good
    ]
    return {
        "kind": example.kind,
        "system": example.messages[0].content if len(example.messages) > 1 else "",
        "asked": example.messages[-1].content,
        "answer": answer,
        "wrong": [*wrong, *verdict.contradictions],
        "budget": example.budget,
    }


def _share(good: Iterable[bool]) -> float:
    """Rounded to four places; 1.0 of nothing."""
    values = list(good)
    return round(sum(values) / len(values), 4) if values else 1.0
