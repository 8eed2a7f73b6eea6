"""JSON Schemas as grammars over tokens. Used by the chat engine, and as a program that tries one:

    python -m worker.grammar < schema.json        exit code 1 with a line that says why not

Some schemas of two kilobytes compile for minutes, and nothing in the library bounds that; so fronts
try each one in a process of its own, with the limits below, before an engine sees it.
"""

from __future__ import annotations

import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from worker.errors import Unsupported

# Of the program, its start included. An ordinary schema takes some milliseconds and megabytes.
CPU_S = 1
MEMORY_BYTES = 2 << 30  # of address space; libraries reserve much more than they touch
# Between tokens of JSON: a space, or a line and its indentation. A model that knows little JSON
# would fill an answer with more.
_WHITE_SPACE = r"( |\n {0,16})?"
_SHOWN_CHARS = 300  # of the library's reason for a refusal


def matcher(schema: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Where an answer begins. schema: JSON Schema as JSON text. Raises Unsupported."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITE_SPACE}
        )
    except ValueError as exc:
        raise unsupported(str(exc)) from exc
    made = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    made.compute_bitmask()  # some errors, such as a schema that is only itself, come no earlier
    if made.is_error():
        raise unsupported(made.get_error())
    return made


def unsupported(reason: str) -> Unsupported:
    """reason: the library's own."""
    shown = " ".join(reason.split("<state>")[0].split())[:_SHOWN_CHARS]
    return Unsupported(f"response_format: this schema cannot be enforced: {shown}")


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        matcher(sys.stdin.buffer.read().decode(), LLTokenizer("byte"))
    except Unsupported as exc:
        print(exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
