"""The demo painters' tokenizers, made from texts about scenes and common English words.

Each has the form that its published family has, so that the loaders and the pipelines meet the
real thing: lower-cased BPE with word ends for CLIP, a unigram model with byte fallback for T5. Any
text can be encoded by both.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from demo_models.scenes import caption, random_description, with_details

END_OF_TEXT = "<|endoftext|>"
CLIP_VOCABULARY = 1430  # without start and end

_COMMON = (
    "about above across afternoon again against almost along already always another"
    " anything appear around arrive bathroom beautiful because become behind believe below between"
    " birthday breakfast brother building business careful carpenter century certain change chapter"
    " children choose circle clothes company complete corner country course cousin decide describe"
    " different difficult dinner direction discover distance doctor during early earth eight either"
    " empty engine enough evening every everyone example excellent explain family famous father"
    " favourite feather february finger finish flower follow foreign forget forward friend fruit"
    " furniture future general glance government grandmother ground happen healthy heart history"
    " holiday hospital hundred husband imagine important inside instead interest january jacket"
    " journey jungle kindness kingdom knowledge ladder language large laughter learn leather listen"
    " machine material measure medicine memory message middle minute mistake moment money morning"
    " mother movement music natural nature neighbour never newspaper nothing notice number object"
    " ocean office orange outside pattern people perfect perhaps person picture piece planet"
    " possible practice prepare present problem promise question quickly quiet railway rainbow"
    " reason remember result return rhythm sandwich school season second secret sentence seven"
    " several shoulder signal silence simple sister something sometimes special square station"
    " strange straight stream student subject suddenly sugar surface surprise sweater table teacher"
    " temperature ten thank themselves thirty thousand through thunder together tomorrow touch"
    " towards travel triangle trouble twelve understand university usually vegetable voice wait"
    " warm watch wednesday weekend welcome whisper winner without wonder world writing yesterday"
)


def picture_corpus(sentences: int = 6000) -> list[str]:
    """Texts that the demo painters read, with the English words beside them; always the same."""
    chance = random.Random(1730)
    texts = []
    for number in range(sentences):
        text = caption(random_description(chance, motion=number % 2 == 0), chance)
        texts.append(with_details(text, chance, film=True) if number % 3 else text)
    return texts + [word for word in _COMMON.split() for _ in range(3)]


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """CLIP's form: bytes, bytes that end a word, merges, start and end token.

    pad_token: the first SDXL encoder pads with the end token, the second one with "!" (id 0).
    """
    shape: Tokenizer = CLIPTokenizer().backend_tokenizer
    pieces = Counter(
        piece
        for text in picture_corpus()
        for piece, _ in shape.pre_tokenizer.pre_tokenize_str(shape.normalizer.normalize_str(text))
    )
    # The 256 letters that stand for bytes, in the published order, which begins with "!".
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A word's last letter is another symbol than the same letter inside. The library's trainer can
    # do that itself, but numbers these symbols anew each time, and with them what wins between
    # two pairs of one count. Here each is one character with a fixed place.
    last = {letter: chr(0xE000 + number) for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        show_progress=False,
        initial_alphabet=[*letters, *last.values()],
    )
    backend.train_from_iterator(
        (
            " ".join([piece[:-1] + last[piece[-1]]] * count)
            for piece, count in sorted(pieces.items())
        ),
        trainer,
    )
    endings = {mark: f"{letter}</w>" for letter, mark in last.items()}
    merges = [
        tuple("".join(endings.get(one, one) for one in part) for part in pair)
        for pair in json.loads(backend.to_str())["model"]["merges"]
    ]
    ends = list(endings.values())
    words = [left + right for left, right in merges]
    tokens = [*letters, *ends, *words, "<|startoftext|>", END_OF_TEXT]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's form: pad 0, `</s>` 1, `<unk>` 2, then bytes, words and letters with their scores.

    Not of class T5TokenizerFast: that one builds its unigram model anew when it is loaded, and
    leaves the byte fallback out.
    """
    counts = Counter(f"▁{word}" for sentence in _t5_texts() for word in sentence.split())
    letters = Counter(letter for word, count in counts.items() for letter in word * count)
    # A word wins over its letters, and letters win over bytes, whatever their number.
    total = counts.total()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    pieces += [(word, math.log(count / total)) for word, count in sorted(counts.items())]
    pieces += [(letter, -12.0) for letter in sorted(letters) if letter not in counts]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, _ in pieces[:3]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def _t5_texts() -> list[str]:
    """Words as they stand, with and without the marks beside them."""
    texts = picture_corpus()
    return texts + [re.sub(r"[,.]", " ", text) for text in texts]
