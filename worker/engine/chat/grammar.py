"""Structured output: which tokens may come next, so that the answer is JSON of a schema.

The grammar sees bytes of tokens alone; what a model would rather say is left to the draw among
what is allowed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from llguidance import LLMatcher, LLTokenizer

from worker.grammar import matcher, unsupported


class GrammarCompiler:
    """Schemas to grammars for one model's tokenizer. Engine thread only.

    Fronts have tried each schema before, in limits of time and memory (worker/front/schemas.py).
    """

    def __init__(self, tokenizer_file: Path, *, vocabulary: int, end_id: int):
        """vocabulary: size of the logits; at least that of the tokenizer.
        end_id: the token that ends an answer; where a grammar allows an end, it allows this one."""
        self._tokenizer = LLTokenizer(tokenizer_file.read_text("utf-8"), vocabulary, end_id)

    def compile(self, schema: str) -> Grammar:
        """schema: JSON Schema as JSON text. Raises Unsupported where it is more than is known."""
        return Grammar(matcher(schema, self._tokenizer))


class Grammar:
    """Where one answer is in its grammar. Engine thread only."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def forbidden(self, vocabulary: int) -> torch.Tensor:
        """(vocabulary,) of bool: the tokens that may not come next. Raises Unsupported."""
        mask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():  # its mask would only let the answer end
            raise unsupported(self._matcher.get_error())
        bits = torch.frombuffer(mask, dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return allowed.flatten()[:vocabulary] == 0

    def take(self, token: int) -> None:
        """Go on with a token that was allowed. Raises Unsupported where the library gives up."""
        if not self._matcher.consume_token(token):
            raise unsupported(self._matcher.get_error())
