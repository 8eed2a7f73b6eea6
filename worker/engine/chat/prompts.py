"""What turns messages into token ids, for every chat model, loaded or not."""

from __future__ import annotations

from collections.abc import Sequence

from worker.catalog import ModelSpec
from worker.engine.chat.model import PromptReader
from worker.protocol.messages import Render, Rendered


class Prompts:
    """A reader for each model, made when it is first wanted. Engine thread and loading thread."""

    def __init__(self, specs: Sequence[ModelSpec]):
        self._specs = {spec.id: spec for spec in specs}
        self._readers: dict[str, PromptReader] = {}

    def reader(self, model_id: str) -> PromptReader:
        """Raises ModelUnavailable."""
        if model_id not in self._readers:
            self._readers[model_id] = PromptReader(self._specs[model_id])
        return self._readers[model_id]

    def render(self, message: Render) -> Rendered:
        """The ids that a request would begin with; nothing runs. Raises ModelUnavailable."""
        reader = self.reader(message.model)
        text, ids, template = reader.read(message.messages, message.prompt)
        return Rendered(
            request_id=message.request_id,
            text=text,
            ids=ids,
            template=template,
            tokenizer_sha256=reader.tokenizer.sha256,
            context_tokens=reader.context_tokens,
        )
