"""The language of templates and rules: a small part of Jinja2 that always ends.

A text is parsed and only the node kinds below are let through, at edit time and again before the
first rendering. What is left:

- text, `{{ name }}`, constants, `a if b else c`, comparisons, and/or/not;
- `{% if %}`, and `{% for one in name %}` over a list variable, not within another loop;
- the filters and tests of gateway/prompts/filters.py, which give at most MAX_CHARS characters.

There is no attribute, subscript, call, assignment, arithmetic, import, include, block or macro, so
no template reaches an object of this process or makes work out of nothing. Why it ends: each node
is evaluated once, or MAX_ITEMS times in a loop; `cost` adds these up, a text operation counting
TEXT_COST; above MAX_COST a text is refused. A rendering is then at most MAX_COST / TEXT_COST
operations on texts of bounded length, and its output is cut off at MAX_OUTPUT characters with an
error. No clock is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import TemplateFault
from gateway.prompts.filters import FILTERS, ITEMS, TESTS, WITH_ARGUMENT, shown
from gateway.prompts.variables import MAX_ITEMS

MAX_TEMPLATE = 32_000  # characters of one text
MAX_NODES = 4_000
MAX_DEPTH = 24  # nodes within nodes; Python's own compiler gives up at 100 levels
MAX_COST = 16_000
TEXT_COST = 32  # a filter, a test or a comparison; it may walk a whole text
MAX_ARGUMENT = 200  # characters of a filter's argument
KEPT = 2_048  # compiled texts, the least recently used go

# Names that Jinja2 gives a meaning of its own.
RESERVED = frozenset({"loop", "self", "super", "caller", "varargs", "kwargs"})

_ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.If,
    nodes.For,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Filter,
    nodes.Test,
)
_TEXT_OPERATIONS = (nodes.Filter, nodes.Test, nodes.Compare)


def check_template(text: str, variables: Iterable[str] = ()) -> None:
    """Raises TemplateFault with the construct and the line if `text` is not of this language.

    variables: names that a version says it needs; each has to be one that a text can use.
    """
    compiled(text)
    for name in variables:
        if not name.isidentifier() or name in RESERVED or name.startswith("_"):
            raise TemplateFault(f"{_short(name)} cannot be the name of a variable")


def variables_of(text: str) -> frozenset[str]:
    """Names that the text takes from outside, also those in branches that may not run."""
    return compiled(text).names


class Compiled:
    """One text, ready to render. Frozen after __init__; any thread renders it."""

    __slots__ = ("names", "plain", "template")

    def __init__(self, text: str) -> None:
        """Raises TemplateFault."""
        # Most rules are plain; Jinja2 would take 20 times as long for the same characters.
        self.plain: str | None = None if "{" in text else text
        self.names: frozenset[str] = frozenset()
        self.template: Template | None = None
        if len(text) > MAX_TEMPLATE:
            raise TemplateFault(f"it has {len(text)} characters; {MAX_TEMPLATE} are the most")
        if self.plain is not None:
            return
        environment = _environment()
        try:
            tree = environment.parse(text)
        except TemplateSyntaxError as error:
            raise TemplateFault(f"line {error.lineno}: it cannot be read as a template") from error
        except (RecursionError, ValueError, OverflowError) as error:
            raise TemplateFault("it is nested too deep or has a number too long") from error
        self.names = _checked(tree)
        self.template = environment.from_string(tree)


@lru_cache(maxsize=KEPT)
def compiled(text: str) -> Compiled:
    """The text, parsed once. The cache is the process's own, locked by functools; a text that is
    refused is not kept. Raises TemplateFault."""
    return Compiled(text)


@cache
def _environment() -> Environment:
    """Never changed after it is made, so any thread may use it."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
        cache_size=0,
    )
    environment.globals.clear()
    environment.filters.clear()
    environment.filters.update(FILTERS)
    environment.tests.clear()
    environment.tests.update(TESTS)
    return environment


def _checked(tree: nodes.Template) -> frozenset[str]:
    """Names from outside. Loops get the ITEMS filter, which takes lists only. Raises
    TemplateFault."""
    names: set[str] = set()
    count = cost = 0
    # (node, depth, whether in a loop, names that loops around it have bound)
    stack: list[tuple[nodes.Node, int, bool, frozenset[str]]] = [(tree, 0, False, frozenset())]
    while stack:
        node, depth, in_loop, bound = stack.pop()
        count += 1
        cost += (TEXT_COST if isinstance(node, _TEXT_OPERATIONS) else 1) * (
            MAX_ITEMS if in_loop else 1
        )
        if not isinstance(node, _ALLOWED):
            raise _fault(node, f"{type(node).__name__} is not part of the template language")
        if depth > MAX_DEPTH:
            raise _fault(node, f"nested deeper than {MAX_DEPTH}")
        if count > MAX_NODES or cost > MAX_COST:
            raise TemplateFault(
                f"it would take more work than one text may ({MAX_NODES} parts, cost {MAX_COST}); "
                "use fewer filters and shorter loops"
            )
        if isinstance(node, nodes.Name):
            if node.name in RESERVED or node.name.startswith("_"):
                raise _fault(node, f"the name {_short(node.name)} is reserved")
            if node.name not in bound:
                names.add(node.name)
        elif isinstance(node, nodes.Filter | nodes.Test):
            _check_operation(node)
        elif isinstance(node, nodes.For):
            stack.extend(_loop(node, depth, in_loop, bound))
            continue
        stack.extend((child, depth + 1, in_loop, bound) for child in node.iter_child_nodes())
    return frozenset(names)


def _loop(
    node: nodes.For, depth: int, in_loop: bool, bound: frozenset[str]
) -> list[tuple[nodes.Node, int, bool, frozenset[str]]]:
    """What is left to check in a loop, after its own form is."""
    if in_loop:
        raise _fault(node, "a loop within a loop")
    if node.recursive or node.test is not None:
        raise _fault(node, "a loop with `if` or `recursive` in its head")
    if not isinstance(node.target, nodes.Name) or not isinstance(node.iter, nodes.Name):
        raise _fault(node, "a loop that is not `for one in name`")
    target = node.target.name
    if target in RESERVED or target.startswith("_"):
        raise _fault(node, f"the name {_short(target)} is reserved")
    inside = bound | {target}
    source = node.iter
    node.iter = nodes.Filter(source, ITEMS, [], [], None, None, lineno=node.lineno)
    left: list[tuple[nodes.Node, int, bool, frozenset[str]]] = [(source, depth + 1, False, bound)]
    left += [(child, depth + 1, True, inside) for child in node.body]
    left += [(child, depth + 1, False, bound) for child in node.else_]
    return left


def _check_operation(node: nodes.Filter | nodes.Test) -> None:
    kind, known = ("filter", FILTERS) if isinstance(node, nodes.Filter) else ("test", TESTS)
    if node.node is None or node.name not in known or node.name == ITEMS:
        listed = ", ".join(sorted(set(known) - {ITEMS}))
        raise _fault(node, f"no {kind} of that name; there are {listed}")
    if node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _fault(node, f"{kind} {node.name}: arguments by name or by star")
    if len(node.args) > (1 if kind == "filter" and node.name in WITH_ARGUMENT else 0):
        raise _fault(node, f"{kind} {node.name}: too many arguments")
    for argument in node.args:
        if not isinstance(argument, nodes.Const) or not isinstance(argument.value, str | int):
            raise _fault(node, f"{kind} {node.name}: an argument that is no constant")
        if isinstance(argument.value, str) and len(argument.value) > MAX_ARGUMENT:
            raise _fault(node, f"{kind} {node.name}: an argument over {MAX_ARGUMENT} characters")


def _fault(node: nodes.Node, what: str) -> TemplateFault:
    return TemplateFault(f"line {node.lineno}: {what}")


def _short(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 40 else text[:37] + "…"
