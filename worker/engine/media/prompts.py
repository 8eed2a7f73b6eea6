"""The texts of an image job for SDXL's two encoders: weights of terms, and texts over 75 tokens.

A short text without weights goes the pipeline's own way. Others go through compel's embeddings
provider, which is given tokens and a weight for each of them, so nothing in a text is read as
syntax. Tokens are always those of the whole text, as the pipeline's own way has them.

A text of more than 75 tokens is cut into pieces of 75, each of which an encoder reads with a begin
and an end of its own; their hidden states follow one another. The pooled state is the first
piece's, as the denoiser takes one. The shorter of the two texts of a guided job is followed by
pieces of nothing. A weight does not change the pooled state: compel has no rule for that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from worker.engine.media.embeddings import Tensors
from worker.engine.media.weighting import weighing
from worker.protocol.messages import RenderParams
from worker.vram.texts import Reader, Text, prompt_of, text_pieces, token_counts


class Prompts:
    """What SDXL's text encoders make of texts. Engine thread only."""

    def __init__(self, pipeline: Any, long_prompts: str):
        """long_prompts: chunk, cut into pieces; refuse, take what an encoder reads at once."""
        self._pipeline = pipeline
        self.long_prompts = long_prompts
        self._encoders = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")

    def counts(self, text: str) -> dict[str, int]:
        """Tokens of `text` per encoder, begin and end tokens of one piece included.

        Raises PromptTooLong when they are more than the profile takes: nothing is cut silently.
        """
        return token_counts(text, self._readers(), self.long_prompts)

    def pieces(self, params: RenderParams) -> int:
        """In how many pieces the longer of a job's texts is read. Raises PromptTooLong."""
        return text_pieces(params, self._readers(), self.long_prompts)

    def _readers(self) -> list[Reader]:
        tokenizers = {name: getattr(self._pipeline, name) for name, _ in self._encoders}
        return [
            Reader(name, partial(_count, one), one.model_max_length)
            for name, one in tokenizers.items()
        ]

    @torch.inference_mode()
    def encoded(self, params: RenderParams, device: torch.device) -> Tensors:
        """What the denoiser reads of a job's texts, on the CPU: hidden states (1, 77 a piece,
        width) and pooled ones (1, width), of the negative prompt too where there is guidance.
        Raises PromptTooLong."""
        prompt, pieces = prompt_of(params), self.pieces(params)
        if pieces == 1 and prompt.is_plain:
            made = self._pipeline.encode_prompt(
                prompt=prompt.whole,
                negative_prompt=params.negative_prompt,
                device=device,
                do_classifier_free_guidance=params.guided,
            )
        else:
            made = self._in_pieces(params, prompt, pieces, device)
        return {name: one.cpu() for name, one in zip(_NAMES, made, strict=True) if one is not None}

    def _in_pieces(
        self, params: RenderParams, prompt: Text, pieces: int, device: torch.device
    ) -> tuple[torch.Tensor | None, ...]:
        """In the order of `_NAMES`."""
        hidden, pooled = self._of(prompt, pieces, device)
        if not params.guided:
            return hidden, None, pooled, None
        if params.negative_prompt is None and self._pipeline.config.force_zeros_for_empty_prompt:
            return hidden, torch.zeros_like(hidden), pooled, torch.zeros_like(pooled)
        negative = Text((params.negative_prompt or "",), (1.0,))
        negative_hidden, negative_pooled = self._of(negative, pieces, device)
        return hidden, negative_hidden, pooled, negative_pooled

    def _of(
        self, text: Text, pieces: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = []
        for tokenizer_name, encoder_name in self._encoders:
            provider = weighing(
                getattr(self._pipeline, tokenizer_name), getattr(self._pipeline, encoder_name)
            )
            state = provider.get_embeddings_for_weighted_prompt_fragments(
                [[*text.parts]], [[*text.weights]], device=device
            )
            missing = pieces - state.shape[1] // provider.max_token_count
            if missing:
                nothing = provider.empty_z.to(state.dtype)
                state = torch.cat([state, *[nothing] * missing], dim=1)
            states.append(state)
        # The last of both: `provider` is the second encoder's.
        ids, _, _ = provider.get_token_ids_and_expand_weights(
            [*text.parts], [*text.weights], device=device
        )
        first = ids[: provider.max_token_count].unsqueeze(0)
        pooled = provider.text_encoder(first).text_embeds
        hidden = torch.cat([one.to(pooled.dtype) for one in states], dim=-1)
        return hidden, pooled


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


_NAMES = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
