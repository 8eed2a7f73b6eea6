"""Structured output: which tokens may come next, so that the answer is JSON of a schema.

The grammar is llguidance's. It sees bytes of tokens alone; what a model would rather say is left
to the draw among what is allowed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from llguidance import LLMatcher, LLTokenizer

from worker.errors import Unsupported

# Between tokens of JSON: a space, or a line and its indentation. A model that knows little JSON
# would fill an answer with more.
_WHITE_SPACE = r"( |\n {0,16})?"
_SHOWN_CHARS = 300  # of the library's reason for a refusal


class GrammarCompiler:
    """Schemas to grammars for one model's tokenizer. Engine thread only."""

    def __init__(self, tokenizer_file: Path, *, vocabulary: int, end_id: int):
        """vocabulary: size of the logits; at least that of the tokenizer.
        end_id: the token that ends an answer; where a grammar allows an end, it allows this one."""
        self._tokenizer = LLTokenizer(tokenizer_file.read_text("utf-8"), vocabulary, end_id)

    def compile(self, schema: str) -> Grammar:
        """schema: JSON Schema as JSON text. Raises Unsupported where it is more than is known."""
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITE_SPACE}
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:_SHOWN_CHARS]
            raise Unsupported(f"response_format: this schema cannot be enforced: {reason}")
        return Grammar(matcher)


class Grammar:
    """Where one answer is in its grammar. Engine thread only."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def forbidden(self, vocabulary: int) -> torch.Tensor:
        """(vocabulary,) of bool: the tokens that may not come next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return allowed.flatten()[:vocabulary] == 0

    def take(self, token: int) -> None:
        """Go on with a token that was allowed."""
        taken = self._matcher.consume_token(token)
        assert taken, self._matcher.get_error()
