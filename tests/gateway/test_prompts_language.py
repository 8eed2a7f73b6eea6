"""The template language: what it has, what it refuses, and that it always ends.

The hostile texts are the classes of the public collections of Jinja2 sandbox escapes (attribute
walks, filters that read attributes, format strings, globals, blocks that load, resource use).
"""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import TemplateFault
from gateway.prompts import language
from gateway.prompts.language import check_template, variables_of
from gateway.prompts.render import MAX_OUTPUT, render
from gateway.prompts.variables import MAX_ITEMS, Value

BIG = "9" * 5000

HOSTILE = (
    # attribute walks to classes and modules
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ {}.__class__.__bases__[0] }}",
    "{{ prompt.__class__ }}",
    "{{ prompt.upper() }}",
    "{{ prompt.encode }}",
    "{{ ().__class__.__base__ }}",
    "{{ (1).__class__ }}",
    "{{ x.__init__.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' 'ss__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "{{ prompt['upper']() }}",
    "{{ prompt[0] }}",
    "{{ prompt[::-1] }}",
    "{{ names[0].__class__ }}",
    # filters and tests that read attributes or call
    "{{ ''|attr('__class__') }}",
    "{{ prompt|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ ''|attr(request) }}",
    "{{ names|map(attribute='__class__')|list }}",
    "{{ names|map('attr', '__class__')|list }}",
    "{{ names|selectattr('__class__')|list }}",
    "{{ names|rejectattr('__class__')|first }}",
    "{{ names|groupby('__class__') }}",
    "{{ names|sort(attribute='__class__') }}",
    "{{ names|sum(attribute='__class__') }}",
    "{{ names|unique(attribute='__class__')|list }}",
    "{{ prompt|xmlattr }}",
    "{{ prompt|pprint }}",
    "{{ prompt|tojson }}",
    "{{ prompt|urlize }}",
    "{{ prompt is filter }}",
    "{{ prompt is callable }}",
    "{{ prompt is eq(prompt) }}",
    # format strings
    "{{ '{0.__class__}'.format(prompt) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}",
    "{{ '%s'|format(prompt) }}",
    "{{ '%s' % prompt }}",
    "{{ '%1000000000d'|format(1) }}",
    "{% set f = ''.format %}{{ f() }}",
    # globals and what hides behind them
    "{{ range(10) }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict(a=1) }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ config.items() }}",
    "{{ request.application.__globals__ }}",
    "{{ self }}",
    "{{ loop }}",
    "{% for n in names %}{{ loop.__class__ }}{% endfor %}",
    "{% for n in names %}{{ loop }}{% endfor %}",
    "{% for n in names %}{{ loop(names) }}{% endfor %}",
    "{{ caller() }}",
    "{{ super() }}",
    "{{ varargs }}",
    "{{ _ }}",
    "{{ __builtins__ }}",
    "{% for __class__ in names %}{% endfor %}",
    # statements that load, define or change
    "{% import 'os' as os %}",
    "{% from 'os' import popen %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'layout' %}",
    "{% block b %}{% endblock %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% call prompt() %}{% endcall %}",
    "{% set x = 'a' %}",
    "{% set x %}a{% endset %}",
    "{% set ns.x = 1 %}",
    "{% with x = 1 %}{{ x }}{% endwith %}",
    "{% filter upper %}a{% endfilter %}",
    "{% autoescape true %}{% endautoescape %}",
    "{% do prompt.upper() %}",
    "{% trans %}a{% endtrans %}",
    "{% debug %}",
    # work and memory out of nothing
    "{{ 'a' * 1000000000 }}",
    "{{ 10 ** 1000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 1 / 0 }}",
    "{{ 1 // 0 }}",
    "{{ -prompt }}",
    "{{ 'a' ~ 'b' }}",
    "{{ [1, 2] }}",
    "{{ {'a': 1} }}",
    "{{ range(1000000000)|list }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in 'abc' %}x{% endfor %}",
    "{% for i in [1, 2] %}x{% endfor %}",
    "{% for a in names %}{% for b in names %}x{% endfor %}{% endfor %}",
    "{% for a in names recursive %}{{ loop(names) }}{% endfor %}",
    "{% for a in names if a %}x{% endfor %}",
    "{% for a, b in names %}x{% endfor %}",
    "{% for a in names|join %}x{% endfor %}",
    "{{ prompt|center(1000000000) }}",
    "{{ prompt|ljust(1000000000) }}",
    "{{ prompt|indent(1000000000) }}",
    "{{ prompt|replace('a', 'aaaaaaaaaa') }}",
    "{{ prompt|wordwrap(1) }}",
    "{{ prompt|batch(1) }}",
    "{{ prompt|slice(1000000000)|list }}",
    "{{ names|join(prompt) }}",
    "{{ names|join('" + "x" * 5000 + "') }}",
    "{{ prompt|default(prompt) }}",
    "{{ prompt|upper(*names) }}",
    "{{ prompt|upper(**names) }}",
    "{{ prompt|truncate(length=9) }}",
    "{{ prompt|_items }}",
    "{% for n in names %}" + "{{ prompt|upper }}" * 40 + "{% endfor %}",
    "{{ prompt" + "|upper" * 2000 + " }}",
    "{{ " + "(" * 5000 + "prompt" + ")" * 5000 + " }}",
    "{{ " + "not " * 5000 + "prompt }}",
    "{{ prompt " + "and prompt " * 2000 + "}}",
    "{% if prompt %}" * 500 + "{% endif %}" * 500,
    "{{ prompt|upper('x') }}",
    "{{ prompt|truncate(-1) }}",
    "{{ prompt }}{{ prompt|lower }}" * 1000,
    "{{ " + BIG + " }}",
    "x" * 40_000,
    "{" * 40_000,
    "{{" * 10_000,
    "{#" * 10_000,
    "{% raw %}" * 3_000,
    "{% if " * 5_000,
)
# Not of the language, but nothing that it does not say: they end, and give only text.
HARMLESS = (
    ("{{ '' | upper }}", ""),
    ("{{ 'a' if prompt == 'sea' else 'b' }}", "a"),
    ("{{ '{{ prompt }}' }}", "{{ prompt }}"),
    ("{% raw %}{{ ''.__class__ }}{% endraw %}", "{{ ''.__class__ }}"),
    ("{# {{ ''.__class__ }} #}", ""),
    ("${prompt} #{prompt} <%= prompt %>", "${prompt} #{prompt} <%= prompt %>"),
    ("{{ '%s' }}", "%s"),
    ("{{ true }}{{ none }}{{ 7 }}", "true7"),
)
VALUES: dict[str, Value] = {"prompt": "sea", "names": ("Mara", "Oren"), "empty": "", "nothing": ()}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_is_refused_when_it_is_edited_and_when_it_is_rendered(text: str) -> None:
    with pytest.raises(TemplateFault):
        check_template(text)
    with pytest.raises(TemplateFault):
        render(text, dict(VALUES), "template t")


@pytest.mark.parametrize(("text", "expected"), HARMLESS)
def test_what_only_looks_hostile_is_text(text: str, expected: str) -> None:
    assert render(text, dict(VALUES), "template t") == expected


def test_there_are_sixty_hostile_templates_at_least() -> None:
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{prompt}} {{ prompt }}\n", "sea sea\n"),
        ("{{ prompt|upper|lower|title|capitalize|trim }}", "Sea"),
        ("{{ names }}", "Mara\nOren"),
        ("{{ names|join(' and ') }}", "Mara and Oren"),
        ("{{ names|first }}-{{ names|last }}-{{ names|length }}", "Mara-Oren-2"),
        ("{{ nothing|first }}{{ nothing|last }}{{ nothing|join }}", ""),
        ("{{ prompt|truncate(2) }} {{ prompt|length }} {{ prompt|wordcount }}", "se 3 1"),
        ("{{ unknown|default('guest') }} {{ empty|default('none') }}", "guest none"),
        ("{% if unknown is defined %}a{% elif prompt %}b{% else %}c{% endif %}", "b"),
        ("{% if unknown is undefined and none is none and not empty %}a{% endif %}", "a"),
        ("{% for n in names %}* {{ n }}\n{% endfor %}", "* Mara\n* Oren\n"),
        ("{% for n in nothing %}x{% else %}nobody{% endfor %}", "nobody"),
        ("{% if 'Mara' in names and 'ea' in prompt and 1 < 2 %}both{% endif %}", "both"),
        ("<lora:{{ prompt }}:0.8> (sea:1.2)", "<lora:sea:0.8> (sea:1.2)"),
    ],
)
def test_the_language_writes_what_it_is_for(text: str, expected: str) -> None:
    check_template(text)

    assert render(text, dict(VALUES), "template t") == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{{ gone }}", "gone"),
        ("{{ gone|upper }}", "gone"),
        ("{{ gone|join }}", "gone"),
        ("{% if gone %}x{% endif %}", "gone"),
        ("{% if gone == 'a' %}x{% endif %}", "gone"),
        ("{% for n in gone %}x{% endfor %}", "gone"),
        ("{{ 'a' if gone else 'b' }}", "gone"),
    ],
)
def test_a_missing_variable_is_named_with_the_text_that_wants_it(text: str, name: str) -> None:
    with pytest.raises(TemplateFault, match=f"template t v3: the variable {name} is missing") as at:
        render(text, dict(VALUES), "template t v3")

    assert at.value.fields == {"missing": [name]}


@pytest.mark.parametrize(
    "text",
    [
        "{{ prompt|first }}",
        "{{ prompt|join }}",
        "{% for n in prompt %}{{ n }}{% endfor %}",
        "{% if prompt < 3 %}a{% endif %}",
        "{{ prompt|truncate('a') }}",
    ],
)
def test_a_value_of_another_kind_is_a_fault_and_not_a_crash(text: str) -> None:
    check_template(text)

    with pytest.raises(TemplateFault, match="template t"):
        render(text, dict(VALUES), "template t")


@pytest.mark.parametrize("name", ["loop", "_x", "a b", "", "1st", "a.b"])
def test_a_version_cannot_need_what_no_text_can_name(name: str) -> None:
    check_template("text", ("user_name", "prompt"))

    with pytest.raises(TemplateFault, match="cannot be the name of a variable"):
        check_template("text", (name,))


def test_names_are_told_without_those_that_a_loop_binds() -> None:
    names = variables_of("{{ a }}{% for b in c %}{{ b }}{{ d }}{% endfor %}{% if e %}{% endif %}")

    assert names == {"a", "c", "d", "e"}
    assert variables_of("no braces") == frozenset()


def test_a_name_that_a_loop_binds_is_from_outside_again_after_it() -> None:
    assert variables_of("{% for b in c %}{% else %}{{ b }}{% endfor %}") == {"b", "c"}


def test_what_a_value_brings_is_never_rendered() -> None:
    values: dict[str, Value] = {"prompt": "{{ secret }} {% for x in y %} {# c #}", "secret": "kept"}

    assert render("<{{ prompt }}>", values, "t") == "<{{ secret }} {% for x in y %} {# c #}>"


def test_an_output_over_its_limit_is_a_fault() -> None:
    values: dict[str, Value] = {
        "prompt": "x" * (MAX_OUTPUT // 10),
        "names": tuple(["n"] * MAX_ITEMS),
    }

    with pytest.raises(TemplateFault, match=f"over {MAX_OUTPUT} characters"):
        render("{% for n in names %}{{ prompt }}{% endfor %}", values, "t")


def test_an_error_has_no_text_of_the_values() -> None:
    with pytest.raises(TemplateFault) as at:
        render("{{ prompt|first }}", {"prompt": "very private"}, "t")

    assert "private" not in str(at.value)


FRAGMENTS = st.lists(
    st.sampled_from(
        (
            "{{", "}}", "{%", "%}", "{#", "#}", " prompt ", " names ", "|upper", "|join", "|attr",
            " if ", " else ", " endif ", " for n in ", " endfor ", "(", ")", "[0]", ".x", "'a'",
            " not ", " and ", " is defined", " ~ ", "*", "9", "__class__", "loop", " in ", "\n",
            " raw ", " endraw ", "-", "set x = ", "é",
        )
    ),
    max_size=25,
).map("".join)  # fmt: skip


@settings(deadline=None)
@given(FRAGMENTS)
def test_any_text_is_refused_or_gives_text_within_its_bounds(text: str) -> None:
    try:
        check_template(text)
    except TemplateFault:
        return
    try:
        written = render(text, dict(VALUES), "t")
    except TemplateFault:
        return

    assert isinstance(written, str)
    assert "0x" not in written and "<class" not in written
    assert len(written) <= MAX_OUTPUT


class Steps:
    """Counts the lines that Python runs, as a measure of work without a clock."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: object, event: str, argument: object) -> Steps:
        self.count += 1
        return self


@pytest.mark.parametrize(
    "text",
    [
        "{% for n in names %}" + "{{ n|upper }}" * 6 + "{% endfor %}",
        "{% for n in names %}" + "{{ n }}" * 100 + "{% endfor %}",
        "{{ prompt|upper }}" * 400,
        "{{ prompt }}" * 1900,
        "{% if prompt == 'x' %}a{% endif %}" * 300,
    ],
)
def test_the_dearest_template_that_passes_takes_bounded_steps(text: str) -> None:
    values: dict[str, Value] = {"prompt": "sea", "names": tuple(["n"] * MAX_ITEMS)}
    check_template(text)
    steps = Steps()

    before = sys.gettrace()
    sys.settrace(steps)
    try:
        render(text, values, "t")
    finally:
        sys.settrace(before)

    # Eight lines for each unit of cost: the generated code, the filter, and what it calls.
    assert steps.count <= 8 * language.MAX_COST
