"""The demo models' tokenizers, made from a small English text that is written here.

Each has the form that its published family has, so that the loaders and the pipelines meet the
real thing: byte-level BPE with a split rule for Qwen2, lower-cased BPE with word ends for CLIP, a
unigram model with byte fallback for T5. Any text can be encoded by all of them.
"""

from __future__ import annotations

import json
import math
import random
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
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_SPECIALS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
CHAT_VOCABULARY, CLIP_VOCABULARY = 1800, 1500

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

_WORDS = {
    "colour": "red green blue yellow orange purple white black golden silver crimson amber teal"
    " violet turquoise scarlet ivory copper emerald grey",
    "looks": "quiet crowded ancient modern wooden glass rusty gentle enormous little broken bright"
    " misty frozen abandoned narrow polished distant wild elegant",
    "thing": "lighthouse bicycle umbrella mountain river castle teapot violin locomotive sailboat"
    " lantern bridge robot dragon fox horse owl cat dog garden window piano astronaut market"
    " waterfall telescope clock carousel balloon submarine greenhouse staircase",
    "person": "a painter|a sailor|an old gardener|a young dancer|two children|a street musician"
    "|a scientist|a fisherman|a chef|an engineer|a librarian|a photographer",
    "action": "walks|is dancing|reads a letter|sleeps|is painting|rides slowly|looks up|is waiting"
    "|laughs|sings|is running|carries a basket|opens the door|plays chess",
    "place": "harbour forest desert meadow library kitchen station rooftop village cathedral beach"
    " valley workshop theatre museum orchard island canyon glacier city",
    "time": "at dawn|at noon|at sunset|at midnight|in early spring|in summer|in autumn|in winter"
    "|after the rain|before the storm|during a festival|under falling snow",
    "light": "soft morning light|golden hour|neon glow|candlelight|harsh shadows|volumetric light"
    "|moonlight|studio lighting|backlit fog|warm reflections|overcast sky|firelight",
    "camera": "wide angle|close-up portrait|aerial view|slow tracking shot|handheld camera"
    "|shallow depth of field|macro photograph|long exposure|35mm film|cinematic composition"
    "|time lapse|low angle|panning left|zooming in",
    "style": "oil painting|watercolor|photograph|pencil sketch|concept art|pixel art|documentary"
    "|woodcut print|highly detailed|sharp focus|best quality|minimalist poster",
    "flaw": "blurry|low quality|deformed hands|watermark|text|out of focus|grainy|overexposed",
    "common": "about above across afternoon again against almost along already always another"
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
    " warm watch wednesday weekend welcome whisper winner without wonder world writing yesterday",
    "question": "Hello, how are you today?|What is the weather like tomorrow?|Can you help me with"
    " this?|Tell me a short story.|Why is the sky blue?|Could you explain that again, please?|How"
    " many minutes does it take?|Where should we go next?|What do you think about it?",
    "answer": "I'm fine, thank you.|I don't know, but I'll try.|Of course! Here is one.|That's a"
    " good question.|It depends on the size and the number of steps.|You're welcome.|Let's begin"
    " with the first part.|We've seen this before, haven't we?|She'd rather wait until later.",
}
_FORMS = (
    "A {looks} {colour} {thing} in the {place} {time}, {light}, {camera}.",
    "{person} {action} near the {looks} {thing} {time}; {light}.",
    "{style} of a {colour} {thing}, {camera}, {light}, {style}",
    "The {thing} stands between the {place} and the {looks} {place}, {time}.",
    "user\n{question}\nassistant\n{answer} The {thing} is {colour}, not {colour}.\n",
    "system\nYou are a {looks} assistant.\n",
    "{flaw}, {flaw}, {flaw}, {light}",
    "{common}, {common} and {common}: {common} {common} {common}.",
    "Frame {number}: {person} {action}, {camera}, {number} seconds at {number} frames.",
)


def corpus(sentences: int = 4000) -> list[str]:
    """English sentences about pictures, films and small talk; the same ones every time."""
    chance = random.Random(1729)
    choices = {
        name: words.split("|") if "|" in words else words.split() for name, words in _WORDS.items()
    }
    choices["number"] = [str(number) for number in range(121)]

    def fill(form: str) -> str:
        for name, words in choices.items():
            while (slot := f"{{{name}}}") in form:
                form = form.replace(slot, chance.choice(words), 1)
        return form

    return [fill(chance.choice(_FORMS)) for _ in range(sentences)]


def chat_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's form; the special tokens come after the ordinary vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    merges = _train(backend, CHAT_VOCABULARY)
    ordinary = [*_byte_letters(), *map("".join, merges)]
    specials = {
        number: AddedToken(text, special=True, normalized=False)
        for number, text in enumerate(CHAT_SPECIALS, start=len(ordinary))
    }
    return Qwen2Tokenizer(
        vocab=_numbered(ordinary),
        merges=merges,
        added_tokens_decoder=specials,
        unk_token=None,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """CLIP's form: bytes, bytes that end a word, merges, start and end token.

    pad_token: the first SDXL encoder pads with the end token, the second one with "!" (id 0).
    """
    shape: Tokenizer = CLIPTokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer, backend.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    merges = _train(backend, CLIP_VOCABULARY, end_of_word_suffix="</w>")
    letters = _byte_letters()
    ends = [f"{letter}</w>" for letter in letters]
    words = [left + right for left, right in merges]
    return CLIPTokenizer(
        vocab=_numbered([*letters, *ends, *words, "<|startoftext|>", END_OF_TEXT]),
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's form: pad 0, `</s>` 1, `<unk>` 2, then bytes, words and letters with their scores.

    Not of class T5TokenizerFast: that one builds its unigram model anew when it is loaded, and
    leaves the byte fallback out.
    """
    counts = Counter(f"▁{word}" for sentence in corpus() for word in sentence.split())
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


def _train(backend: Tokenizer, size: int, *, end_of_word_suffix: str = "") -> list[tuple[str, str]]:
    """The merges of a byte-level BPE of about `size` tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=end_of_word_suffix,
    )
    backend.train_from_iterator(corpus(), trainer)
    merges: list[list[str]] = json.loads(backend.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in the published order, which begins with "!"."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
