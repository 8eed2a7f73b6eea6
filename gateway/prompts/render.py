"""One text with its variables filled in."""

from __future__ import annotations

import re

from jinja2 import UndefinedError

from gateway.errors import TemplateFault
from gateway.prompts.language import compiled
from gateway.prompts.variables import Value

MAX_OUTPUT = 400_000  # characters of one rendered text

_UNKNOWN = re.compile(r"^'(\w+)' is undefined$")


def render(text: str, values: dict[str, Value], where: str) -> str:
    """The text with `values` filled in once: braces that a value brings stay as they are.

    where: what the text is, for errors: "template chat_sfw v2, system prompt".
    Raises TemplateFault: a variable that is missing, by name; a construct that the language does
    not have; an output over MAX_OUTPUT characters.
    """
    try:
        one = compiled(text)
    except TemplateFault as error:
        raise TemplateFault(f"{where}: {error}") from error
    if one.plain is not None:
        return one.plain
    if one.template is None:
        raise TemplateFault(f"{where}: it was not compiled")
    context = one.template.new_context(values, shared=True)
    pieces: list[str] = []
    length = 0
    try:
        for piece in one.template.root_render_func(context):
            length += len(piece)
            if length > MAX_OUTPUT:
                raise TemplateFault(f"{where}: over {MAX_OUTPUT} characters when rendered")
            pieces.append(piece)
    except UndefinedError as error:
        found = _UNKNOWN.match(str(error))
        name = found.group(1) if found else "of one part"
        raise TemplateFault(
            f"{where}: the variable {name} is missing; send it, or guard it with `is defined`",
            fields={"missing": [found.group(1)] if found else []},
        ) from None
    except TypeError as error:
        raise TemplateFault(f"{where}: two values of different kinds are put together") from error
    except TemplateFault as error:
        message = str(error)
        raise TemplateFault(
            message if message.startswith(where) else f"{where}: {message}"
        ) from error
    return "".join(pieces)
