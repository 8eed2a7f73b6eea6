"""What the chat benchmark asks: the same prompts and lengths of every server."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = (
    "prompt image light lens camera photo detail colour soft warm background subject sharp focus"
    " paint table garden street river mountain forest night morning wooden glass metal small large"
).split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a system text, a user text, and how many tokens are to come."""

    system: str
    user: str
    new_tokens: int


Workload = Callable[[random.Random, int], list[Ask]]


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def shared(chance: random.Random, count: int) -> list[Ask]:
    """One system prompt of about 430 tokens, short prompts, 64 new tokens."""
    system = _text(random.Random(1), 300)
    return [Ask(system, _text(chance, 12), 64) for _ in range(count)]


def mixed(chance: random.Random, count: int) -> list[Ask]:
    """The same system prompt, 16 to 256 new tokens."""
    system = _text(random.Random(1), 300)
    return [Ask(system, _text(chance, 12), chance.randint(16, 256)) for _ in range(count)]


def apart(chance: random.Random, count: int) -> list[Ask]:
    """Nothing in common: each has a system prompt of its own."""
    return [Ask(_text(chance, 300), _text(chance, 12), 64) for _ in range(count)]


def long(chance: random.Random, count: int) -> list[Ask]:
    """Prompts of about 1,500 tokens of their own, 64 new tokens."""
    return [Ask(_text(chance, 1050), _text(chance, 12), 64) for _ in range(count)]


WORKLOADS: dict[str, Workload] = {"shared": shared, "mixed": mixed, "apart": apart, "long": long}


def messages(ask: Ask) -> Sequence[dict[str, str]]:
    """As clients send it."""
    return (
        {"role": "system", "content": ask.system},
        {"role": "user", "content": ask.user},
    )
