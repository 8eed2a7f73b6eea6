"""demo-chat's tokenizer: byte-level BPE in Qwen2's form, trained on the grammar's own text.

Every word that a prompt or a detail of the grammar may contain is one token, so that copying it
is one step; any other text becomes pieces or bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from demo_models import chat_words, scenes
from demo_models.conversation import Message, training_example

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
VOCABULARY = 2400  # without the special tokens
CONTEXT = 2048  # tokens

# Qwen2's rule for what a word is: digits stand alone, contractions and newlines are their own.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML as it is: nothing is said that no message says.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> Qwen2Tokenizer:
    """The same one every time; the special tokens come after the ordinary vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The 256 letters that stand for bytes, in the published order, which begins with "!".
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=letters
    )
    backend.train_from_iterator(corpus(), trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    ordinary = [*letters, *map("".join, merges)]
    specials = {
        number: AddedToken(text, special=True, normalized=False)
        for number, text in enumerate(SPECIALS, start=len(ordinary))
    }
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(ordinary)},
        merges=merges,
        added_tokens_decoder=specials,
        unk_token=None,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def corpus(conversations: int = 6000) -> Iterator[str]:
    """Texts of training conversations, and the prompts' words often enough to be one token."""
    chance = random.Random(1729)
    for _ in range(conversations):
        example = training_example(chance)
        for message in (*example.messages, Message("assistant", example.answer)):
            yield f"{message.role}\n{message.content}"
    for word in prompt_words():
        yield from [f" {word}"] * 200


def prompt_words() -> tuple[str, ...]:
    """Every word of scenes, of the wider world and of details; without the rare ones."""
    tables = (
        scenes.SHAPES, scenes.COLOURS, scenes.BACKGROUNDS, scenes.LIGHTS, scenes.CAMERAS,
        scenes.QUALITIES, scenes.FILMS, ("a", "an", "background", "both", "next", "plain"),
        *scenes.PLACE_WORDS.values(), *scenes.RELATION_WORDS.values(),
        *scenes.MOTION_WORDS.values(), *scenes.SIZE_WORDS.values(),
        chat_words.NOUNS, chat_words.WIDE_COLOURS, chat_words.LOOKS, chat_words.COUNTS,
        chat_words.SETTINGS, chat_words.TIMES, chat_words.GOING, chat_words.STAYING,
    )  # fmt: skip
    found = {word for table in tables for text in table for word in text.split()}
    return tuple(sorted(word for word in found if word.isalpha()))
