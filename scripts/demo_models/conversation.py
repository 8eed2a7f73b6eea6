"""The grammar of demo-chat: conversations and their right answers, made from words.

An enhancement's answer is the prompt's own content, letter by letter, and then details of light
and camera (image) or motion, film and light (video), inside the budget that the system prompt
asks for. Other conversations are small talk and questions about the daemon (small_talk.py).

`training_example` and `evaluation_example` never share a description, a combination of noun and
colour, an unknown word, a system prompt's wording or a question's phrasing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from demo_models import chat_words as words
from demo_models import small_talk
from demo_models.scenes import (
    CAMERAS,
    FILMS,
    LIGHTS,
    MOTION_WORDS,
    QUALITIES,
    Description,
    caption,
    evaluation_description,
    training_description,
)

Kind = Literal["image", "video", "chat"]
Fits = Literal["shape", "mover", "thing", "fixed", "copy"]
T = TypeVar("T")

# Of these, an answer has one at most.
EXCLUSIVE = (
    {"studio lighting", "diffused daylight", "golden hour glow", "soft window light",
     "natural light"},
    {"35mm photograph", "50mm lens"},
    {"close-up", "wide angle"},
    {"fine texture", "smooth surface"},
    {"slow tracking shot", "steady camera", "static camera", "gentle camera move"},
)  # fmt: skip
DAYLIGHT = {"diffused daylight", "golden hour glow", "soft window light", "natural light"}
# "centered framing" would contradict places, and "film grain" belongs to neither style.
IMAGE_DETAILS = tuple(
    one for one in (*LIGHTS, *CAMERAS, *QUALITIES) if one not in ("centered framing", "film grain")
)
VIDEO_DETAILS = (*FILMS, *LIGHTS)
# Every image answer begins its details with one of these, every video answer with a film's.
IMAGE_MARKS = ("35mm photograph", "50mm lens", "shallow depth of field", "sharp focus",
               "professional photography", "highly detailed", "high resolution", "eye level view",
               "wide angle", "close-up", "balanced composition")  # fmt: skip
OPENINGS = ("A photograph of ", "A detailed photograph of ", "A photo of ")
# Words that an answer aims at: without a budget, a share of the budget's tens (a small model counts
# roughly), and at most.
FREE_WORDS, BUDGET_SHARE, MOST_WORDS = 33, 0.85, 45
WORDS_PER_TOKEN = 0.7  # of this vocabulary, with punctuation
SMALLEST_BUDGET, LARGEST_BUDGET = 15, 95


def _looks(marks: Sequence[str], details: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For each mark one fixed order of details that go together; every second one fits a night."""
    made = []
    for number, mark in enumerate(marks):
        look = [mark]
        for detail in random.Random(number).sample(details, k=len(details)):
            others = {detail}.union(*(group for group in EXCLUSIVE if detail in group))
            if not others & set(look) and not (number % 2 and detail in DAYLIGHT):
                look.append(detail)
        made.append(tuple(look))
    return tuple(made)


# An answer follows one of them for as long as its budget lasts. A free choice of each detail would
# be noise that this little training has no time to average out.
LOOKS = {"image": _looks(IMAGE_MARKS, IMAGE_DETAILS), "video": _looks(FILMS, VIDEO_DETAILS)}


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A short prompt and what is known about it."""

    text: str  # what the answer repeats
    keep: tuple[str, ...]  # things with their numbers and colours, each as the prompt writes it
    fits: Fits  # which motions can be added
    description: Description | None = None  # of scenes.py, where it is one of its scenes
    moves: bool = False  # it says how something moves, or stays
    night: bool = False
    details: tuple[str, ...] = ()  # that the text itself names already


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation up to its last question, and a right answer."""

    kind: Kind
    messages: tuple[Message, ...]
    answer: str
    prompt: Prompt | None = None  # of an enhancement
    budget: int | None = None  # most words that the answer may have
    intent: str | None = None  # of a chat
    signs: tuple[str, ...] = ()  # a right answer of a chat has one of them


class Source:
    """What may be drawn from: the part for training or the part for evaluation."""

    def __init__(self, chance: random.Random, *, held_out: bool):
        self.chance = chance
        self.held_out = held_out

    def wording(self, wordings: Sequence[T]) -> T:
        part = words.held_out if self.held_out else words.trained
        return self.chance.choice(part(wordings))

    def description(self, *, motion: bool) -> Description:
        draw = evaluation_description if self.held_out else training_description
        return draw(self.chance, motion=motion)

    def allows(self, key: str) -> bool:
        """Whether a combination belongs to this part: a tenth is held out, by a stable hash."""
        value = 7
        for letter in key:
            value = (value * 31 + ord(letter)) % 1_000_003
        return (value % 10 == 0) == self.held_out


def training_example(chance: random.Random) -> Example:
    """A conversation for training; about a tenth are long."""
    source = Source(chance, held_out=False)
    share = chance.random()
    if share < 0.40:
        return enhancement(source, "image", long=chance.random() < 0.06)
    if share < 0.70:
        return enhancement(source, "video", long=chance.random() < 0.06)
    return talk(source, turns=chance.randint(4, 9) if chance.random() < 0.08 else None)


def evaluation_example(chance: random.Random, kind: Kind) -> Example:
    """A conversation of which training has seen neither the wordings nor the content."""
    source = Source(chance, held_out=True)
    return talk(source, turns=1) if kind == "chat" else enhancement(source, kind)


# --- enhancement ---------------------------------------------------------------------------------


def enhancement(source: Source, kind: Literal["image", "video"], *, long: bool = False) -> Example:
    """long: a system prompt of many sentences and some answered prompts before the last one."""
    chance = source.chance
    # Half again as many in training: few words say what is asked, so each must be known well.
    bare = chance.random() < (0.2 if source.held_out else 0.3) and not long
    if bare:
        prompt = random_prompt(source, moving=kind == "video" and chance.random() < 0.5)
        plain = kind == "image" and chance.random() < 0.35
        text = prompt.text if plain else _request(source, kind).format(prompt.text)
        answer = enhanced(prompt, kind, FREE_WORDS, chance)
        return Example(kind, (Message("user", text),), answer, prompt)
    prompts = [
        random_prompt(source, moving=kind == "video" and chance.random() < 0.5)
        for _ in range(chance.randint(2, 4) if long else 1)
    ]
    least = max(word_count(prompt.text) for prompt in prompts) + (4 if kind == "image" else 8)
    system, budget, aim = system_prompt(source, kind, least=least, long=long)
    messages = [Message("system", system)]
    for prompt in prompts:
        form = source.wording(words.WRAPPERS) if chance.random() < 0.2 else "{}"
        messages.append(Message("user", form.format(prompt.text)))
        messages.append(Message("assistant", enhanced(prompt, kind, aim, chance)))
    answer = messages.pop().content
    return Example(kind, tuple(messages), answer, prompts[-1], budget)


def _request(source: Source, kind: Literal["image", "video"]) -> str:
    """A request without a system prompt; evaluation takes only the ones that are written out."""
    chance = source.chance
    forms = words.IMAGE_REQUESTS if kind == "image" else words.VIDEO_REQUESTS
    if source.held_out or chance.random() < 0.4:
        return source.wording(forms)
    media = words.IMAGE_MEDIA if kind == "image" else words.VIDEO_MEDIA
    while True:
        medium = chance.choice(media)
        how = chance.random()
        made = f"{medium} {chance.choice(words.REQUEST_NOUNS)}{chance.choice(words.REQUEST_ENDS)}"
        if how < 0.5:
            verb = source.wording(words.VERBS).lower()
            made = f"{chance.choice(words.PLEASE)}{verb} {chance.choice(words.THIS)} {made}"
        elif how < 0.6:
            made = f"{medium}: {{}}"
        elif how < 0.75:
            made = f"{chance.choice(words.OF).format(medium)}{{}}"
        elif how < 0.9:
            made = f"{chance.choice(words.BEFORE_MEDIA)} {made}"
        if chance.random() < 0.5:
            made = made[0].upper() + made[1:]
        if made.lower() not in _HELD_OUT_REQUESTS:
            return made


_HELD_OUT_REQUESTS = {
    form.lower()
    for forms in (words.IMAGE_REQUESTS, words.VIDEO_REQUESTS)
    for form in words.held_out(forms)
}


def system_prompt(
    source: Source, kind: Literal["image", "video"], *, least: int, long: bool = False
) -> tuple[str, int | None, int]:
    """One of many wordings, the words that it allows, and how many an answer aims at.

    least: the smallest budget.
    """
    chance = source.chance
    image = kind == "image"
    role = source.wording(words.IMAGE_ROLES if image else words.VIDEO_ROLES)
    task = source.wording(words.IMAGE_TASKS if image else words.VIDEO_TASKS)
    if chance.random() < 0.5:
        aim = source.wording(words.IMAGE_AIMS if image else words.VIDEO_AIMS)
        task = f"{source.wording(words.VERBS)} {source.wording(words.TEXTS)} {aim}."
    own = words.IMAGE_RULES if image else words.VIDEO_RULES
    rules = {source.wording(words.RULES) for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4)))}
    rules |= {source.wording(own) for _ in range(chance.choice((0, 0, 0, 0, 1)))}
    if long:
        rules |= {source.wording(words.RULES) for _ in range(20)}
    budget, sentence, aim = None, "", FREE_WORDS
    if chance.random() < 0.65:
        unit = chance.choice(("words", "words", "tokens"))
        factor = WORDS_PER_TOKEN if unit == "tokens" else 1.0
        low = min(LARGEST_BUDGET, max(SMALLEST_BUDGET, int(least / factor) + 1))
        # Half of them small, where they matter most; round ones are common in the field.
        number = chance.randint(low, max(low, chance.choice((40, LARGEST_BUDGET))))
        if chance.random() < 0.4:
            number = min(LARGEST_BUDGET, -(-number // 5) * 5)
        budget = int(number * factor)
        # The first digit decides: a small model reads one better than two.
        low_end = max(SMALLEST_BUDGET, number // 10 * 10)
        aim = min(MOST_WORDS, int(low_end * factor * BUDGET_SHARE))
        if chance.random() < 0.3:
            ending = source.wording(words.BUDGET_ENDINGS).format(n=number, unit=unit)
            task = task.rstrip(".") + ending
        else:
            sentence = source.wording(words.BUDGETS).format(n=number, unit=unit)
    middle = chance.sample(sorted(rules), k=len(rules))
    if sentence:
        middle.insert(chance.randint(0, len(middle)), sentence)
    first = [role, task] if chance.random() < 0.6 else [task]
    if chance.random() < 0.05 and len(first) == 2:
        first = [role]
    sentences = [*first, *middle]
    return ("\n" if chance.random() < 0.1 else " ").join(sentences), budget, aim


def enhanced(
    prompt: Prompt, kind: Literal["image", "video"], aim: int, chance: random.Random
) -> str:
    """A right answer to a prompt, of about `aim` words where the prompt leaves room."""
    text = prompt.text
    roomy = aim >= word_count(text) + 6
    if kind == "image" and prompt.fits != "copy" and text[0].islower() and roomy:
        text = chance.choice(("", "", "", chance.choice(OPENINGS))) + text
    parts = [text]
    if kind == "video" and (motion := added_motion(prompt, chance)):
        parts.append(motion)
    used = word_count(" ".join(parts))
    # There is always room for a first detail of two words: it may use the margin.
    room = max(aim, used + 2)
    fitting = [
        look
        for look in LOOKS[kind]
        if used + word_count(look[0]) <= room
        and look[0] not in prompt.details
        and not (prompt.night and DAYLIGHT & set(look))
    ]
    for detail in chance.choice(fitting):
        others = {detail}.union(*(group for group in EXCLUSIVE if detail in group))
        if others & set(prompt.details):
            continue
        used += word_count(detail)
        if used > room:
            break
        parts.append(detail)
    return f"{', '.join(parts)}."


def added_motion(prompt: Prompt, chance: random.Random) -> str:
    """A motion that the prompt does not name and that its things can make; "" for none."""
    if prompt.moves or prompt.fits == "fixed":
        return ""
    if prompt.description is not None:
        return chance.choice(MOTION_WORDS[chance.choice(possible_motions(prompt.description))])
    ways = ("turning",) if prompt.fits == "thing" else ("left", "right")
    return chance.choice(MOTION_WORDS[chance.choice(ways)])


def possible_motions(wanted: Description) -> tuple[str, ...]:
    """The motions that demo-video has seen such things make; what has a place leaves it."""
    circles = any(thing.shape == "circle" for thing in wanted.things)
    places = {thing.place for thing in wanted.things} - {None}
    if places and not circles:
        return ("turning",)
    if len(places) == 2:
        return ("up", "down") if "left" in places else ("left", "right")
    away = {"left": ("right",), "right": ("left",), "top": ("down",), "bottom": ("up",)}
    for where in places:
        if where in away:
            return away[where]
    if wanted.relation in ("above", "below"):
        return ("left", "right")
    if wanted.relation:
        return ("up", "down")
    ways = ("left", "right", "up", "down")
    return ways if circles else (*ways, "turning")


def word_count(text: str) -> int:
    return len(text.split())


# --- prompts -------------------------------------------------------------------------------------


def random_prompt(source: Source, *, moving: bool) -> Prompt:
    """Half of them scenes of shapes; moving: a motion is named where one is possible."""
    share = source.chance.random()
    if share < 0.48:
        prompt = scene_prompt(source, moving=moving)
    elif share < (0.86 if source.held_out else 0.68):
        prompt = wide_prompt(source, moving=moving)
    else:
        prompt = unknown_prompt(source)
    if source.chance.random() < (0.06 if source.held_out else 0.18):
        detail = source.chance.choice((*LIGHTS, *QUALITIES))
        prompt = replace(prompt, text=f"{prompt.text}, {detail}", details=(detail,))
    return prompt


def scene_prompt(source: Source, *, moving: bool) -> Prompt:
    wanted = source.description(motion=moving)
    text = caption(wanted, source.chance)
    keep = tuple(f"{thing.colour} {thing.shape}" for thing in wanted.things)
    return Prompt(text, keep, "shape", wanted, moves=moving)


def wide_prompt(source: Source, *, moving: bool) -> Prompt:
    """Animals, people, vehicles, buildings, plants and objects, in places and doing things."""
    chance = source.chance
    first, keep, group = _noun_phrase(source)
    parts, kept = [first], [keep]
    fits: Fits = "fixed"
    if group in (words.ANIMALS, words.PEOPLE, words.VEHICLES):
        fits = "mover"
    elif group is words.OBJECTS:
        fits = "thing"
    two = chance.random() < 0.25
    if two:
        second, keep, _ = _noun_phrase(source)
        parts.append(chance.choice(("and", "and", "next to", "with")))
        parts.append(second)
        kept.append(keep)
        fits = "fixed" if fits == "thing" else fits
    moves = False
    if moving and fits in ("mover", "thing"):
        ways = ("turning",) if fits == "thing" else ("left", "right", "up", "down")
        parts.append(chance.choice(MOTION_WORDS[chance.choice(ways)]))
        moves = True
    elif group in (words.ANIMALS, words.PEOPLE) and chance.random() < 0.45:
        doing = [*words.GOING, *words.STAYING]
        if group is words.PEOPLE:
            doing = [*doing, *words.DOING, *words.DOING]
        action = chance.choice(doing)
        colour, thing = chance.choice(words.WIDE_COLOURS), chance.choice(words.OBJECTS)
        if "{colour}" in action:
            kept.append(f"{colour} {action.split()[-1]}")
        elif "{object}" in action:
            kept.append(thing)
        action = action.replace(" a {object}", f" {_article(thing)} {thing}")
        action = action.replace(" a {colour}", f" {_article(colour)} {colour}")
        parts.append(action)
        moves = True
    night = False
    if chance.random() < 0.55:
        parts.append(chance.choice(words.SETTINGS))
    if chance.random() < 0.35:
        time = chance.choice(words.TIMES)
        night = time in words.NIGHT
        parts.append(time)
    text = " ".join(parts)
    if chance.random() < 0.25:
        text = text[0].upper() + text[1:]
    return Prompt(text, tuple(kept), fits, None, moves, night)


def _noun_phrase(source: Source) -> tuple[str, str, tuple[str, ...]]:
    """A phrase, the part of it that must survive, and the group of its noun."""
    chance = source.chance
    while True:
        group = chance.choice(
            (words.ANIMALS, words.ANIMALS, words.VEHICLES, words.PEOPLE, words.BUILDINGS,
             words.PLANTS, words.OBJECTS, words.OBJECTS)
        )  # fmt: skip
        noun = chance.choice(group)
        colour = chance.choice(words.WIDE_COLOURS) if chance.random() < 0.6 else ""
        look = chance.choice(words.LOOKS) if chance.random() < 0.3 else ""
        if source.allows(f"{noun}|{colour}"):
            break
    how = chance.random()
    if how < 0.25:
        count = chance.choice((*words.COUNTS, chance.choice("23456789")))
        keep = " ".join(one for one in (colour, words.PLURALS.get(noun, f"{noun}s")) if one)
        phrase = " ".join(one for one in (count, look, keep) if one)
        return phrase, phrase, group
    keep = " ".join(one for one in (colour, noun) if one)
    phrase = " ".join(one for one in (look, keep) if one)
    return (phrase if how < 0.4 else f"{_article(phrase)} {phrase}"), keep, group


def unknown_prompt(source: Source) -> Prompt:
    """Words that the grammar does not know, and words in an order that it does not know."""
    chance = source.chance
    how = chance.random()
    known = (*words.NOUNS, *words.WIDE_COLOURS, *words.LOOKS)
    if how < 0.3:
        count = chance.randint(3, 7)
        content = [
            unknown_word(source) if chance.random() < 0.4 else chance.choice(known)
            for _ in range(count)
        ]
        return Prompt(" ".join(content), tuple(content), "copy")
    colour = chance.choice(words.WIDE_COLOURS) if chance.random() < 0.6 else ""
    thing = " ".join(one for one in (colour, unknown_word(source)) if one)
    kept = [thing]
    text = f"{_article(thing)} {thing}" if chance.random() < 0.8 else thing
    if chance.random() < 0.2:
        number = str(chance.randint(2, 99))
        text, kept = f"{number} {thing}s", [f"{number} {thing}s"]
    if chance.random() < 0.3:
        other = unknown_word(source)
        text += f" {chance.choice(('and', 'with', 'of', 'near'))} {other}"
        kept.append(other)
    if chance.random() < 0.4:
        text += f" {chance.choice(words.SETTINGS)}"
    return Prompt(text, tuple(kept), "copy")


def unknown_word(source: Source) -> str:
    """A word of another part of English, a name, or syllables that mean nothing."""
    chance = source.chance
    while True:
        how = chance.random()
        if how < 0.4:
            word = chance.choice(words.RARE_WORDS)
        elif how < 0.55:
            word = chance.choice(words.NAMES)
        else:
            word = "".join(chance.choices(words.SYLLABLES, k=chance.randint(2, 4)))
            word = word.title() if chance.random() < 0.3 else word
        if source.allows(word):
            return word


def _article(text: str) -> str:
    return "an" if text[0] in "aeiou" else "a"


# --- chat ----------------------------------------------------------------------------------------


def talk(source: Source, *, turns: int | None = None) -> Example:
    """Small talk and questions; turns: questions, None for mostly one."""
    chance = source.chance
    messages = []
    if chance.random() < 0.5:
        messages.append(Message("system", source.wording(small_talk.CHAT_SYSTEMS)))
    last = Example("chat", (), "")
    for _ in range(turns or chance.choice((1, 1, 1, 1, 2, 3))):
        if messages and messages[-1].role == "user":
            messages.append(Message("assistant", last.answer))
        if chance.random() < 0.12:
            last = _unknown_question(source)
        else:
            last = _question(source, chance.choice(small_talk.INTENTS))
        messages.extend(last.messages)
    if turns is None and chance.random() < 0.15:
        return _follow_up(source)
    return replace(last, messages=tuple(messages))


def _question(source: Source, intent: small_talk.Intent) -> Example:
    text = source.wording(intent.questions)
    if not source.held_out:
        text = _reworded(text, source.chance)
    return _answered(source, intent, _varied(text, source.chance))


def _reworded(text: str, chance: random.Random) -> str:
    """With some words replaced by others of the same meaning, but never a held-out question."""
    new = text
    for pair in small_talk.ALIKE:
        old, other = pair if chance.random() < 0.5 else pair[::-1]
        if chance.random() < 0.5 and re.search(rf"(?<!\w){re.escape(old)}(?!\w)", new):
            new = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", other, new, count=1)
    return text if new.lower() in _HELD_OUT_QUESTIONS else new


_HELD_OUT_QUESTIONS = {
    question.lower()
    for intent in small_talk.INTENTS
    for question in words.held_out(intent.questions)
}


def _answered(source: Source, intent: small_talk.Intent, text: str) -> Example:
    answer = source.chance.choice(intent.answers)
    asked = (Message("user", text),)
    return Example("chat", asked, answer, intent=intent.name, signs=intent.signs)


def _unknown_question(source: Source) -> Example:
    chance = source.chance
    text = source.wording(small_talk.UNKNOWN)
    text = text.replace("{noun}", chance.choice((chance.choice(words.NOUNS), unknown_word(source))))
    text = text.replace("{name}", chance.choice((chance.choice(words.NAMES), unknown_word(source))))
    while "{digit}" in text:
        text = text.replace("{digit}", str(chance.randint(0, 20)), 1)
    asked = (Message("user", _varied(text, chance)),)
    answer = chance.choice(small_talk.DO_NOT_KNOW)
    return Example("chat", asked, answer, intent="unknown", signs=(small_talk.UNKNOWN_SIGN,))


def _follow_up(source: Source) -> Example:
    intents = {intent.name: intent for intent in small_talk.INTENTS}
    first, texts, then = source.chance.choice(small_talk.FOLLOW_UPS)
    before = _question(source, intents[first])
    after = _answered(source, intents[then], source.wording(texts))
    messages = (*before.messages, Message("assistant", before.answer), *after.messages)
    return replace(after, messages=messages)


def _varied(text: str, chance: random.Random) -> str:
    """The same question in the manners of different people."""
    if chance.random() < 0.25:
        text = chance.choice(small_talk.BEFORE) + text
    if chance.random() < 0.15:
        text += chance.choice(small_talk.AFTER)
    how = chance.random()
    if how < 0.3:
        text = text[0].upper() + text[1:]
    elif how < 0.4:
        text = text.lower()
    return text.rstrip("?") if chance.random() < 0.25 else text
