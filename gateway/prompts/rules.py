"""The texts of rules that match, and where they stand.

Of an exclusive group the first that matches is taken and holds the group, also where it is then
dropped for its length. In a slot the texts stand so, each apart from the next by the slot's
separator, empty ones left out:

    prepend rules in order · the template's text · append rules in order
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway.prompts.render import render
from gateway.prompts.variables import Value
from gateway.values.assembly import Counter, Step
from gateway.values.rows import Rule

SYSTEM, USER, NEGATIVE = "system", "user", "negative"
SEPARATORS = {SYSTEM: "\n\n", USER: "\n", NEGATIVE: ", "}
PREPEND = "prepend"


@dataclass(frozen=True, slots=True)
class Part:
    """A rule with its text, as it is put into a slot."""

    rule: Rule
    text: str


def parts(
    rules: Iterable[Rule],
    values: dict[str, Value],
    counters: Mapping[str, Counter],
) -> tuple[tuple[Part, ...], tuple[Step, ...]]:
    """The texts of rules that match, in order, without those that are dropped.

    counters: by slot, for max_tokens. Raises TemplateFault with the rule's name.
    """
    taken: list[Part] = []
    steps: list[Step] = []
    holders: dict[str, int] = {}
    for rule in rules:
        group = rule.exclusive_group
        if group is not None:
            holder = holders.setdefault(group, rule.id)
            if holder != rule.id:
                why = f"rule {holder} holds its group"
                steps.append(_step(rule, "skipped", why, group=group, holder=holder))
                continue
        text = render(rule.body, values, f"rule {rule.name}")
        if not text:
            steps.append(_step(rule, "skipped", "it is empty when rendered"))
            continue
        if rule.max_tokens is not None:
            tokens = counters[rule.slot].count(text)
            if tokens > rule.max_tokens:
                why = f"{tokens} tokens; it may have {rule.max_tokens}"
                steps.append(_step(rule, "dropped", why, tokens=tokens, max_tokens=rule.max_tokens))
                continue
        taken.append(Part(rule, text))
        steps.append(_step(rule, "applied", f"{rule.rule_type} to {rule.slot}"))
    return tuple(taken), tuple(steps)


def composed(slot: str, base: Iterable[str], taken: Iterable[Part]) -> str:
    """The whole text of a slot; `base` is what stands between the rules."""
    before: list[str] = []
    after: list[str] = []
    for part in taken:
        if part.rule.slot == slot:
            (before if part.rule.rule_type == PREPEND else after).append(part.text)
    return SEPARATORS[slot].join(text for text in (*before, *base, *after) if text)


def _step(rule: Rule, outcome: str, why: str, **detail: int | str) -> Step:
    return Step(
        step="rule",
        outcome=outcome,
        why=why,
        detail={"id": rule.id, "name": rule.name, "priority": rule.priority, **detail},
    )
