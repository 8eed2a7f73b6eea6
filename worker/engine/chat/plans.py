"""What a chat request would take, found with what a request itself is made of; nothing runs."""

from __future__ import annotations

from worker.engine.chat.model import LanguageModel, PromptReader
from worker.engine.chat.outlook import Outlook
from worker.engine.chat.request import answer_tokens
from worker.engine.chat.scheduler import TokenSequence
from worker.protocol.messages import ChatPlanned, PlanChat
from worker.vram.planner import ChatPool


def planned(
    message: PlanChat,
    reader: PromptReader,
    pool: ChatPool,
    model: LanguageModel | None,
    outlook: Outlook,
    begin_s: float,
) -> ChatPlanned:
    """pool: the whole one of the model. model: None where it is not loaded. begin_s: until a
    request that came now would begin. Raises as `Request` does for its prompt."""
    _, prompt_ids, _ = reader.read(message.messages, message.prompt)
    context_tokens = min(reader.context_tokens, pool.blocks * pool.block_tokens)
    limit = answer_tokens(len(prompt_ids), message.max_tokens, context_tokens)
    sequence = TokenSequence(
        prompt_ids, limit, deterministic=message.deterministic, block_tokens=pool.block_tokens
    )
    cached = model.scheduler.known_tokens(sequence) if model is not None else 0
    return ChatPlanned(
        request_id=message.request_id,
        prompt_tokens=len(prompt_ids),
        cached_tokens=cached,
        max_tokens=limit,
        context_tokens=context_tokens,
        kv_bytes=sequence.most_blocks * pool.block_bytes,
        pool_bytes=model.pool_bytes if model is not None else 0,
        whole_pool_bytes=pool.blocks * pool.block_bytes,
        seconds=outlook.span(begin_s, len(prompt_ids) - cached, limit),
    )
