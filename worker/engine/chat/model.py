"""A causal language model of the catalog, loaded: weights, tokenizer, template."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from worker.catalog import ModelSpec
from worker.engine.chat.template import Piece, Template, Text, find_template, plain_text
from worker.engine.chat.tokenizer import ByteLevelTokenizer
from worker.errors import ConfigError, ModelUnavailable
from worker.modelfiles import combined_sha256, require_files, weight_bytes, weights_sha256
from worker.protocol.messages import ChatMessage

log = logging.getLogger(__name__)


class PromptReader:
    """What turns messages into ids: tokenizer, template, context. Cheap, holds no weights."""

    def __init__(self, spec: ModelSpec):
        """Raises ModelUnavailable when files are missing or do not fit the template."""
        require_files(spec)
        try:
            self.template: Template = find_template(spec.chat_template)
        except ConfigError as exc:
            raise ModelUnavailable(f"{spec.id}: {exc}") from exc
        self.tokenizer = ByteLevelTokenizer(spec.path / "tokenizer.json", spec.shown_path)
        absent = [one for one in self.template.controls if self.tokenizer.control_id(one) is None]
        if absent:
            raise ModelUnavailable(
                f"{spec.id}: its tokenizer has no token {absent[0]}, which template "
                f"{self.template.name} needs"
            )
        config: dict[str, Any] = json.loads((spec.path / "config.json").read_bytes())
        self.context_tokens = int(config["max_position_embeddings"])
        self.end_ids = frozenset(_end_ids(spec.path, config) | self._template_end())

    def _template_end(self) -> set[int]:
        token_id = self.tokenizer.control_id(self.template.end)
        return set() if token_id is None else {token_id}

    def read(
        self, messages: Sequence[ChatMessage], prompt: str | None
    ) -> tuple[str, list[int], str | None]:
        """Text, token ids and template name of a request; a raw prompt has no template."""
        pieces: list[Piece] = self.template.render(messages) if prompt is None else [Text(prompt)]
        name = self.template.name if prompt is None else None
        return plain_text(pieces), self.tokenizer.encode(pieces), name


class LanguageModel:
    """Weights on the device. Engine thread only."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, state_dir: Path, reader: PromptReader
    ):
        """Load; a new object every time. Raises ModelUnavailable."""
        from transformers import AutoModelForCausalLM

        require_files(spec)
        self.weights = f"sha256:{combined_sha256(weights_sha256(spec, state_dir))}"
        self.weight_bytes = weight_bytes(spec)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                spec.path,
                dtype=getattr(torch, spec.dtype),
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
            )
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelUnavailable(f"{spec.id}: {spec.shown_path} does not load: {exc}") from exc
        self._model = model.to(device).eval()
        self._device = device
        self.reader = reader

    def describe(self) -> dict[str, Any]:
        return {
            "context_tokens": self.reader.context_tokens,
            "tokenizer_sha256": self.reader.tokenizer.sha256,
            "template": self.reader.template.name,
            "weights": self.weights,
        }

    @torch.inference_mode()
    def start(self, prompt_ids: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Logits (vocabulary,) after the prompt, and the cache that `step` continues."""
        ids = torch.tensor([list(prompt_ids)], device=self._device)  # (1, tokens)
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    @torch.inference_mode()
    def step(self, token: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits (vocabulary,) after one more token."""
        ids = torch.tensor([[token]], device=self._device)  # (1, 1)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values


def _end_ids(folder: Path, config: dict[str, Any]) -> set[int]:
    """Ids that end a text, by the model's own files. Nothing else of generation_config is used:
    its sampling defaults would be parameters that nobody sent."""
    generation = folder / "generation_config.json"
    sources = [config]
    if generation.is_file():
        sources.append(json.loads(generation.read_bytes()))
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            ids |= set(value) if isinstance(value, list) else {value}
    return ids
