"""How demo-chat learns: batches of conversations, the loss on answers only, and the optimizers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from demo_models.chat_vocabulary import MESSAGE_END, MESSAGE_START, VOCABULARY
from demo_models.conversation import Example, training_example
from demo_models.muon import Muon
from demo_models.training import Average, learning_rate, set_learning_rate

BATCH = 24  # conversations per step; some 2400 tokens
# Tokens of one forward pass, padding included: conversations of like length go together.
PASS_TOKENS = 1024
# What is exact and what is said in a chat must be right to the letter; details are a choice.
EXACT_WEIGHT = 2.0
# Of the commas and the full stop after details, where budgets are kept.
END_WEIGHT = 3.0
NOISE = 0.1  # share of the tokens of instructions and questions that training replaces
AVERAGE_DECAY = 0.99


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation's token ids, and how much the loss weighs the prediction of each."""

    ids: list[int]
    weights: list[float]  # 0 for what the model need not say


class Encoder:
    """Conversations to token ids as the worker's template renders them, piece by piece."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self._backend = tokenizer.backend_tokenizer
        start, end = tokenizer.convert_tokens_to_ids([MESSAGE_START, MESSAGE_END])
        self._start, self._end, self._line = start, end, self._ids("\n")
        self._header = self._ids("assistant\n")
        self._stops = {*self._ids(","), *self._ids(".")}
        self._kept = {*self._ids(" 0123456789"), *self._ids(" words tokens")}

    def conversation(self, example: Example, noise: random.Random | None = None) -> Encoded:
        """With the answer; every assistant's message counts in the loss.

        noise: replaces some tokens of instructions and of questions by any others, so that no
        single word decides and a wording that is not known does not confuse. What an enhancement
        must repeat stays as it is, and so do numbers.
        """
        ids: list[int] = []
        weights: list[float] = []

        def add(more: list[int], weight: float | list[float]) -> None:
            ids.extend(more)
            weights.extend(weight if isinstance(weight, list) else [weight] * len(more))

        for message in example.messages:
            if message.role == "assistant":
                add([self._start, *self._header], 0.0)
                add([*self._ids(message.content), self._end], 1.0)
                add(self._line, 0.0)
            else:
                text = self._ids(f"{message.role}\n{message.content}")
                if noise and (message.role == "system" or example.kind == "chat"):
                    text[2:] = [self._noisy(one, noise) for one in text[2:]]
                add([self._start, *text, self._end, *self._line], 0.0)
        add([self._start, *self._header], 0.0)
        answer = self._ids(example.answer)
        exact = len(answer)
        if example.prompt:
            content = example.prompt.text
            exact = len(self._ids(example.answer[: example.answer.index(content) + len(content)]))
        weight = [EXACT_WEIGHT] * exact
        weight += [END_WEIGHT if one in self._stops else 1.0 for one in answer[exact:]]
        add(answer, weight)
        add([self._end], 1.0)
        return Encoded(ids, weights)

    def question(self, example: Example) -> list[int]:
        """Without the answer, up to where the model goes on."""
        encoded = self.conversation(example)
        answer = self._ids(example.answer)
        return encoded.ids[: len(encoded.ids) - len(answer) - 1]

    def _noisy(self, token: int, noise: random.Random) -> int:
        if token in self._kept or noise.random() > NOISE:
            return token
        return noise.randrange(VOCABULARY)

    def random_copy(self, chance: random.Random) -> Encoded:
        """A user's message of random tokens, and the same tokens as the answer.

        In half of them few tokens come again and again, so that one alone does not say what
        follows; in half of them a system prompt has the same ones in another order.
        """
        few = chance.random() < 0.5
        pool = [chance.randrange(VOCABULARY) for _ in range(chance.randint(5, 9) if few else 400)]
        content = chance.choices(pool, k=chance.randint(2, 20))
        question: list[int] = []
        if chance.random() < 0.5:
            system = chance.choices(pool, k=chance.randint(1, 16))
            question += [self._start, *self._ids("system\n"), *system, self._end, *self._line]
        question += [self._start, *self._ids("user\n"), *content, self._end, *self._line]
        question += [self._start, *self._header]
        ids = [*question, *content, self._end]
        return Encoded(ids, [0.0] * len(question) + [1.0] * (len(content) + 1))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def passes(conversations: Iterable[Encoded]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and weights, each (conversations, longest), of about PASS_TOKENS tokens.

    Padding is on the right, where causal attention never sees it, and weighs 0.
    """
    group: list[Encoded] = []
    for one in sorted(conversations, key=lambda one: len(one.ids)):
        if group and (len(group) + 1) * len(one.ids) > PASS_TOKENS:
            yield _padded(group)
            group = []
        group.append(one)
    if group:
        yield _padded(group)


def _padded(group: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(one.ids) for one in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    weights = torch.zeros(len(group), longest)
    for row, one in enumerate(group):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        weights[row, : len(one.ids)] = torch.tensor(one.weights)
    return ids, weights


class Trainer:
    """One network, its optimizers and its average; the steps are what training.run_stage calls.

    Batch `index` of a stage depends on the seed and the index alone.
    """

    def __init__(self, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int):
        self.model = model
        self.muon, self.adamw = make_optimizers(model)
        self.average = Average(model, AVERAGE_DECAY)
        self._encoder = Encoder(tokenizer)
        self._seed = seed

    def parts(self) -> dict[str, Any]:
        """What run_stage saves and loads."""
        return {
            "model": self.model,
            "muon": self.muon,
            "adamw": self.adamw,
            "average": self.average,
        }

    def copying_step(self, index: int) -> Mapping[str, float]:
        """Any tokens in any order, to be repeated: it cannot be learned by heart."""
        chance = random.Random(self._seed * 1_000_003 + index)
        batch = [self._encoder.random_copy(chance) for _ in range(2 * BATCH)]
        return {"loss": self._update(batch, learning_rate(index, 10**9, 1.0, warm_up=30))}

    def chat_step(self, index: int, steps: int) -> Mapping[str, float]:
        """The grammar's conversations, and some more copying, so that it is not forgotten."""
        rate = learning_rate(index, steps, 1.0, warm_up=20)
        return self._conversations(self._seed + 7, index, BATCH // 8, rate)

    def further_step(self, index: int, steps: int) -> Mapping[str, float]:
        """The same with half the rate, and with more copying, for words that nobody knows."""
        return self._conversations(
            self._seed + 13, index, BATCH // 3, learning_rate(index, steps, 0.5)
        )

    def _conversations(
        self, seed: int, index: int, copies: int, rate: float
    ) -> Mapping[str, float]:
        chance = random.Random(seed * 1_000_003 + index)
        batch = [self._encoder.conversation(training_example(chance), chance) for _ in range(BATCH)]
        batch += [self._encoder.random_copy(chance) for _ in range(copies)]
        return {"loss": self._update(batch, rate)}

    def _update(self, batch: Sequence[Encoded], rate: float) -> float:
        whole = sum(sum(one.weights) for one in batch)
        total = 0.0
        for ids, weights in passes(batch):
            loss = answer_loss(self.model, ids, weights) / whole
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in (self.muon, self.adamw):
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        self.average.update()
        return total


def answer_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the cross entropies; logits are made only where the loss needs them."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets, weights = ids[:, 1:], weights[:, 1:]
    wanted = weights > 0
    logits = model.lm_head(hidden[wanted])
    losses = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    return (losses * weights[wanted]).sum()


def make_optimizers(model: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the layers, AdamW for the embedding, norms and biases."""
    inside = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [p for name, p in inside if p.ndim != 2 or "embed_tokens" in name]
    by_shape = defaultdict(list)
    for name, parameter in inside:
        if parameter.ndim == 2 and "embed_tokens" not in name:
            by_shape[tuple(parameter.shape)].append(parameter)
    groups = [
        {
            "params": parameters,
            # Larger for matrices that widen, instead of Muon's own rule, which is divided out.
            "scale": 0.02 * max(1.0, rows / columns) ** 0.5 / (0.2 * max(rows, columns) ** 0.5),
        }
        for (rows, columns), parameters in by_shape.items()
    ]
    return (
        Muon(groups),
        torch.optim.AdamW(
            [{"params": others, "scale": 0.004}], betas=(0.9, 0.95), weight_decay=0.0, eps=1e-10
        ),
    )
