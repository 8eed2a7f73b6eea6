"""A causal language model of the catalog, loaded: weights, tokenizer, template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from worker.catalog import ModelSpec
from worker.engine.chat.attention import NAME as ATTENTION
from worker.engine.chat.attention import PagedKV, register
from worker.engine.chat.cache import BlockPool, blocks_for
from worker.engine.chat.forward import Forward
from worker.engine.chat.grammar import Grammar, GrammarCompiler
from worker.engine.chat.graphs import PassGraphs, can_record
from worker.engine.chat.linear import can_pack, pack
from worker.engine.chat.runner import Runner
from worker.engine.chat.scheduler import Scheduler, TokenSequence
from worker.engine.chat.template import Piece, Template, Text, find_template, plain_text
from worker.engine.chat.tokenizer import ByteLevelTokenizer
from worker.engine.chat.varlen import can_attend
from worker.engine.chat.weights import WeightFiles
from worker.engine.parking import Parked
from worker.errors import ConfigError, ModelUnavailable
from worker.modelfiles import (
    combined_sha256,
    require_files,
    weight_bytes,
    weight_files,
    weights_sha256,
)
from worker.protocol.messages import ChatMessage
from worker.vram.phases import PASS_TOKENS, block_tokens, reads_pages

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
        self._grammar_parts = (spec.path / "tokenizer.json", int(config["vocab_size"]))
        self._compiler: GrammarCompiler | None = None

    def _template_end(self) -> set[int]:
        token_id = self.tokenizer.control_id(self.template.end)
        return set() if token_id is None else {token_id}

    def grammar(self, schema: str) -> Grammar:
        """A grammar for one answer. Raises Unsupported."""
        if self._compiler is None:
            file, vocabulary = self._grammar_parts
            end_id = min(self._template_end() or self.end_ids)
            self._compiler = GrammarCompiler(file, vocabulary=vocabulary, end_id=end_id)
        return self._compiler.compile(schema)

    def beginning(self, system_prompt: str) -> list[int]:
        """The ids that all chats with this system prompt begin with."""
        first, second = (
            self.read((ChatMessage("system", system_prompt), ChatMessage("user", user)), None)[1]
            for user in ("a", "b")
        )
        return [
            one
            for one, _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(first, second, strict=False)
            )
        ]

    def read(
        self, messages: Sequence[ChatMessage], prompt: str | None
    ) -> tuple[str, list[int], str | None]:
        """Text, token ids and template name of a request; a raw prompt has no template."""
        pieces: list[Piece] = self.template.render(messages) if prompt is None else [Text(prompt)]
        name = self.template.name if prompt is None else None
        return plain_text(pieces), self.tokenizer.encode(pieces), name


class LanguageModel:
    """Weights and KV pool, with what plans and runs passes. Engine thread only.

    Loaded, its weights are on the device of a CPU, and in host memory for a card until `wake`; the
    pool is empty until `resize`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        state_dir: Path,
        reader: PromptReader,
        *,
        kv_bytes: int,
        max_running: int,
        parks: bool | None = None,
    ):
        """Load; a new object every time. Raises ModelUnavailable.

        kv_bytes: of the whole KV pool. max_running: sequences in one pass. parks: whether the
        weights are held in host memory too; None: as `parks` says for the device.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        require_files(spec)
        register()
        self.weights = f"sha256:{combined_sha256(weights_sha256(spec, state_dir))}"
        self.weight_bytes = weight_bytes(spec)
        dtype = getattr(torch, spec.dtype)
        parks = self.parks(device) if parks is None else parks
        packs = not parks and device.type == "cpu" and can_pack(dtype)
        try:
            weights = WeightFiles(weight_files(spec))
            if not packs or any(one.dtype != dtype for one in weights.tensors.values()):
                weights.read_all()
            config = AutoConfig.from_pretrained(
                spec.path, local_files_only=True, trust_remote_code=False
            )
            # What AutoModelForCausalLM does, which takes no weights that are there already.
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=weights.tensors, dtype=dtype,
                attn_implementation=ATTENTION,
            ).eval()  # fmt: skip
            if packs:  # while they come: a slow volume leaves time for it
                pack(model, weights.read)
            if not parks:
                _take_over(model, weights.read)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelUnavailable(f"{spec.id}: {spec.shown_path} does not load: {exc}") from exc
        config = model.config
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise ModelUnavailable(
                f"{spec.id}: some of its layers attend to a window only; this worker runs models "
                "whose layers all see the whole text"
            )
        shape = {
            "layers": config.num_hidden_layers,
            "heads": config.num_key_value_heads,
            "head_size": getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
        }
        self.block_tokens = block_tokens(device.type, spec.dtype, shape["head_size"])
        self._block_bytes = PagedKV.block_bytes(
            **shape, dtype=dtype, block_tokens=self.block_tokens
        )
        self._whole_blocks = kv_bytes // self._block_bytes
        if self._whole_blocks < 1:
            raise ModelUnavailable(
                f"{spec.id}: [chat] kv_bytes is {kv_bytes}, and {self.block_tokens} tokens need "
                f"{self._block_bytes}"
            )
        kv = PagedKV(
            **shape, blocks=0, dtype=dtype, device=device, block_tokens=self.block_tokens,
            pages=reads_pages(device.type, spec.dtype, shape["head_size"])
            and can_attend(
                device, dtype, shape["heads"], config.num_attention_heads, shape["head_size"]
            ),
        )  # fmt: skip
        self._parked = Parked(model, device, name=spec.id) if parks else None
        self.forward = Forward(spec.id, model, device)
        self.reader = reader
        graphs = None
        if kv.pages and can_record(config):
            graphs = PassGraphs(
                self.forward, kv, most_rows=max_running, vocabulary=config.vocab_size,
                pages=blocks_for(self.context_tokens, self.block_tokens),
            )  # fmt: skip
        self.runner = Runner(self.forward, kv, graphs)
        self.pool = BlockPool(0, self.block_tokens)
        self.scheduler = Scheduler(
            self.pool,
            max_running=max_running,
            pass_tokens=max(max_running, PASS_TOKENS[device.type]),
        )

    @staticmethod
    def parks(device: torch.device) -> bool:
        """Whether weights stay in host memory when they leave this device. A CPU's are packed for
        its kernels, in a form that cannot be copied; they are loaded again."""
        return device.type != "cpu"

    @property
    def can_park(self) -> bool:
        return self._parked is not None

    @property
    def on_device(self) -> bool:
        return self._parked is None or self._parked.awake

    def wake(self) -> None:
        """Raises torch.OutOfMemoryError."""
        if self._parked is not None:
            self._parked.wake()

    def park(self) -> None:
        """The weights leave the device. Nothing runs."""
        assert self._parked is not None
        self.runner.forget_graphs()
        self._parked.park()

    def close(self) -> None:
        """Nothing is to be given back but memory."""
        self.runner.forget_graphs()

    @property
    def pool_bytes(self) -> int:
        return self.pool.count * self._block_bytes

    @property
    def needed_pool_bytes(self) -> int:
        """That the longest may take of the sequences which have begun or have been given room."""
        return self.scheduler.most_blocks_kept * self._block_bytes

    def pool_bytes_for(self, sequence: TokenSequence) -> int:
        """That a sequence may take."""
        return sequence.most_blocks * self._block_bytes

    @property
    def whole_pool_bytes(self) -> int:
        return self._whole_blocks * self._block_bytes

    def resize(self, pool_bytes: int) -> None:
        """Another size for the pool. Sequences that do not fit are parked, and come back."""
        blocks = pool_bytes // self._block_bytes
        if blocks != self.pool.count:
            self.runner.resize(self.scheduler, self.pool, blocks)

    def pin(self, system_prompts: Sequence[str], *, deterministic: bool) -> None:
        """Compute the beginnings of chats with these system prompts, and keep them cached.

        Called before there are sequences. Raises ModelUnavailable for one that does not fit.
        """
        names: set[bytes] = set()
        for number, text in enumerate(system_prompts, 1):
            ids = self.reader.beginning(text)
            sequence = TokenSequence(
                ids, 1, deterministic=deterministic, block_tokens=self.block_tokens
            )
            if len(ids) > self.context_tokens:
                raise ModelUnavailable(
                    f"[chat] pinned_system_prompts: number {number} has {len(ids)} tokens, and "
                    f"there is room for {self.context_tokens}"
                )
            if sequence.most_blocks > self.pool.count:
                log.info("system prompt %d is not pinned while the pool is shrunk", number)
                continue
            self.scheduler.add(sequence)
            try:
                while sequence.computed < len(ids):
                    pieces = self.scheduler.plan().pieces
                    self.runner.run(pieces)
                    for piece in pieces:
                        self.scheduler.computed(piece)
            finally:
                self.scheduler.remove(sequence)
            names |= set(sequence.names)
        self.pool.pinned = frozenset(names)

    @property
    def context_tokens(self) -> int:
        """Tokens that one sequence may have: the model's, or as many as the whole KV pool holds.
        One that a shrunk pool does not hold waits until it has grown."""
        return min(self.reader.context_tokens, self._whole_blocks * self.block_tokens)

    def describe(self) -> dict[str, Any]:
        return {
            "context_tokens": self.context_tokens,
            "kv_tokens": self._whole_blocks * self.block_tokens,
            "tokenizer_sha256": self.reader.tokenizer.sha256,
            "template": self.reader.template.name,
            "template_sha256": self.reader.template.sha256,
            "weights": self.weights,
        }


def _take_over(model: Any, read: Callable[[torch.Tensor], None]) -> None:
    """Memory of their own for the weights that are not packed: no pass is to wait for a volume, or
    to fail because a file was replaced."""
    for one in model.parameters():
        read(one)
        one.data = one.data.clone()


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
