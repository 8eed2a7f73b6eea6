"""Whether words say that somebody is under 18."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gateway.content.spelling import MARK

_NAMES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
          " fifteen sixteen seventeen")  # fmt: skip
_NUMBERS = {name: number for number, name in enumerate(_NAMES.split())}
_ADULT = 18  # years
_YEARS = frozenset(
    ("year", "years", "yr", "yrs", "y", "yo", "ans", "an", "anos", "ano", "anni", "jahre", "jahr")
)
_OLD = frozenset(("old", "olds", "o", "alt", "of", "age"))
# These say the age by themselves; "15 years" alone may be how long something took.
_ENOUGH = frozenset(("yo", "ans", "anos", "anni"))
_GLUED = re.compile(r"(\d{1,2})(yo|yos|yr|yrs|y|year|years|yearold|f|jahrig\w*)")
# Before an age. Those of the first line also with a mark between ("a girl, 14").
_LABELS = frozenset("age aged ages girl boy youngster".split())
_LEADS = _LABELS.union(
    "is was am im turned turns turning looks look looking shes hes she he".split()
)
_FILLERS = frozenset(
    "only just about barely like around almost nearly now of at as between".split()
).union((MARK,))
# After a number they make it no age.
_UNITS = frozenset(
    """feet foot ft inch inches cm m mm km kg lbs pounds meters metres miles times minute minutes
    min hour hours second seconds s sec day days week weeks month months percent degrees litre
    litres people persons men women adults friends of x k fps mp stories storeys floors to am pm
    """.split()
)
# What is so old and nobody.
_THINGS = frozenset(
    """whisky whiskey scotch rum wine cognac brandy port bottle bourbon car cars truck tree oak
    house building cheese ship boat dog cat horse marriage relationship company brand friendship
    sofa bed book statue laptop""".split()
)
# "A group of twelve" is no age.
_COUNTED = frozenset(
    """group groups party team crew pack set box total number gang band out part page chapter room
    cast family orgy class maximum minimum score rating size series row circle bunch house each one
    all any most some limit value grade factor""".split()
)
_ENDS = frozenset("who that and in with is was named called".split()).union((MARK,))
_PERSONS = frozenset(
    """girl girls boy boys child pupil pupils student students daughter son sister brother female
    male""".split()
)
_SPANS = frozenset("for since depuis seit desde hace por in after past".split())
# "Emma (14)", "Emma, 14, ..."; a word without a capital may be "panel" or "seed".
_NAMED = re.compile(r"\b[A-Z][a-z]+(?: ?\(1[0-7]\)|, 1[0-7](?=[,.;)]|$))")


def names_age(text: str) -> bool:
    """Whether an age of 10 to 17 stands right after a name: "Emma (14)", "Emma, 14,"."""
    return _NAMED.search(text) is not None


def is_young(tokens: Sequence[str]) -> bool:
    """Whether an age under 18 is said: "15 years old", "fifteen-year-old", "15yo", "aged 15", "she
    is only 15", "looks 15", "15 ans". tokens: folded words with MARK between clauses."""
    for at, token in enumerate(tokens):
        if token[0].isdigit():
            if token.isdecimal():
                if len(token) <= 2 and int(token) < _ADULT and _is_age(tokens, at):
                    return True
            elif (glued := _GLUED.fullmatch(token)) and int(glued[1]) < _ADULT:
                if glued[2] != "f" or int(glued[1]) > 9:  # 5f may be an aperture or a floor
                    return True
        elif token in _NUMBERS and _is_age(tokens, at):
            return True
    return False


def _is_age(tokens: Sequence[str], at: int) -> bool:
    if _stands_for_a_person(tokens, at):
        return True
    following = tokens[at + 1] if at + 1 < len(tokens) else MARK
    before = tokens[at - 1] if at else MARK
    if following in _YEARS and before not in _SPANS:
        rest = tokens[at + 2 : at + 5]
        if following in ("y", "yr", "yrs") and rest and rest[0] == MARK:  # 14 y.o., 14 yrs. old
            rest = rest[1:]
        if following in _ENOUGH or (rest and rest[0] in _OLD | _PERSONS):
            return _THINGS.isdisjoint(rest)
        # "a girl of eleven years"
        return before == "of" and at >= 2 and tokens[at - 2] in _PERSONS
    # "There is 3 roses"; what is counted mostly ends so.
    is_counting = following in _UNITS or (len(following) > 3 and following.endswith("s"))
    # "One" and "two" are rarely ages without a unit.
    if is_counting or _NUMBERS.get(tokens[at], 3) < 3:
        return False
    start = at - 1
    while start >= 0 and at - start <= 2 and tokens[start] in _FILLERS:
        start -= 1
    if start < 0 or tokens[start] not in _LEADS:
        return False
    return tokens[start] in _LABELS or MARK not in tokens[start:at]


def _stands_for_a_person(tokens: Sequence[str], at: int) -> bool:
    """ "A waiter of fifteen": not a number of things, and nothing is counted after it."""
    if at < 2 or tokens[at - 1] != "of" or tokens[at - 2] in _COUNTED or tokens[at - 2] == MARK:
        return False
    number = int(tokens[at]) if tokens[at].isdecimal() else _NUMBERS[tokens[at]]
    following = tokens[at + 1] if at + 1 < len(tokens) else MARK
    return number >= 10 and not tokens[at - 2][0].isdigit() and following in _ENDS
