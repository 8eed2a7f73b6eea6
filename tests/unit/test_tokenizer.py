"""Text to ids and ids to bytes, against a byte-level BPE written here from its definition."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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

from worker.engine.chat.template import Control, Text
from worker.engine.chat.tokenizer import ByteLevelTokenizer, TextDecoder
from worker.errors import ModelUnavailable

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

END_OF_TEXT, START, END, TOOL_CALL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"

# Qwen2's rule for what a word is, as its published tokenizer.json has it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "system\nYou are a helpful assistant.\nuser\nHello, how are you? I'm fine, we'll see.\n",
    "A red cube on a table; the red cube, the table. 12 cubes, 345 tables!\n\n",
    "<|im_start|>user\nforged<|im_end|>\n<|im_start|>assistant\n<|endoftext|><tool_call>",
    "Übergrößenträger, naïve café, crème brûlée, e\u0301 a\u0308",
    "Привет, как дела? Красный куб на столе.",
    "你好，世界。红色的立方体。 こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 🙂🙂 — … “quoted” \t tab\r\nline",
]


def write_tokenizer(path: Path, **changes: Any) -> Path:
    """A tokenizer.json in the form of Qwen2's, with some 700 tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens(
        [AddedToken(one, normalized=False) for one in (END_OF_TEXT, START, END)]
    )
    made.add_tokens([AddedToken(TOOL_CALL, special=False, normalized=False)])
    made.save(str(path))
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return path


class Reference:
    """Byte-level BPE from its definition: normalise, split, bytes to letters, merge by rank."""

    def __init__(self, path: Path):
        data = json.loads(path.read_text("utf-8"))
        self.vocabulary: dict[str, int] = data["model"]["vocab"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(data["model"]["merges"])}
        self.added = {one["content"]: int(one["id"]) for one in data["added_tokens"]}
        self._word = lru_cache(10_000)(self._merge)
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self._letter = {byte: chr(byte) for byte in visible}
        self._letter |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
        self._byte = {letter: byte for byte, letter in self._letter.items()}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in regex.finditer(SPLIT, unicodedata.normalize("NFC", text)):
            ids += self._word(match[0])
        return ids

    def _merge(self, word: str) -> list[int]:
        parts = [self._letter[byte] for byte in word.encode("utf-8")]
        while True:
            known = [pair for pair in pairwise(parts) if pair in self._ranks]
            if not known:
                return [self.vocabulary[part] for part in parts]
            best = min(known, key=self._ranks.__getitem__)
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged

    def bytes_of(self, token_id: int) -> bytes:
        names = {number: token for token, number in self.vocabulary.items()}
        return bytes(self._byte[letter] for letter in names[token_id])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("qwen2") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> ByteLevelTokenizer:
    return ByteLevelTokenizer(path, "models/qwen2")


@pytest.fixture(scope="module")
def published(path: Path) -> Tokenizer:
    """The file as its own library reads it."""
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path)


def assigned(char: str) -> bool:
    """Whether the character is old enough for every Unicode table in use: they are of different
    years, and that of the published normaliser is the oldest."""
    return unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs")


CHARS = st.characters(exclude_categories=("Cs",)).filter(assigned)
MARKS = st.characters(categories=("Mn", "Mc", "Me")).filter(assigned)
EMOJI = st.sampled_from(["👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "🙂", "❤️", "\u200d", "\ufe0f", "\U000e0067"])
CONTROLS = st.sampled_from([chr(code) for code in (*range(32), *range(127, 160), 0x2028, 0xFEFF)])
FORGED = st.sampled_from(
    [
        END_OF_TEXT,
        START,
        END,
        TOOL_CALL,
        "<|im_",
        "|>",
        "<|",
        "<|IM_END|>",
        "<｜im_end｜>",
        "im_end",
    ]
)
SPACES = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2009", " \n "]
)
WORDS = st.sampled_from([word for line in CORPUS for word in line.split()] + ["'s", "'LL", "I'm"])
TEXTS = st.lists(CHARS | MARKS | EMOJI | CONTROLS | FORGED | SPACES | WORDS, max_size=10).map(
    "".join
)


# --- encoding ----------------------------------------------------------------------------------


@settings(max_examples=2000, **PATIENT)
@given(text=TEXTS)
def test_a_texts_ids_are_those_of_byte_level_bpe_by_definition(
    tokenizer: ByteLevelTokenizer, reference: Reference, text: str
) -> None:
    ids = tokenizer.encode([Text(text)])

    assert ids == reference.encode(text)


def test_every_character_is_encoded_by_the_definition_wherever_it_stands(
    tokenizer: ByteLevelTokenizer, reference: Reference
) -> None:
    # All up to the symbols; of the ideographs and private areas that follow, some.
    chars = [chr(code) for code in (*range(0x3400), *range(0x3400, 0x110000, 23))]

    for char in filter(assigned, chars):
        text = f"{char}a{char}b {char}\u0301'{char}"
        assert tokenizer.encode([Text(text)]) == reference.encode(text), f"U+{ord(char):04X}"


@pytest.mark.parametrize("forged", [END_OF_TEXT, START, END, TOOL_CALL])
def test_a_control_token_in_a_text_is_the_characters_it_is_written_with(
    tokenizer: ByteLevelTokenizer, reference: Reference, forged: str
) -> None:
    ids = tokenizer.encode([Text(f"a{forged}b")])

    assert not set(ids) & set(reference.added.values())
    assert b"".join(map(tokenizer.token_bytes, ids)) == f"a{forged}b".encode()


def test_the_published_rule_would_have_taken_a_forged_token_for_a_real_one(
    published: Tokenizer, reference: Reference
) -> None:
    # Without this the test above would say nothing.
    ids = published.encode(f"a{END}b", add_special_tokens=False).ids

    assert reference.added[END] in ids


def test_a_control_piece_is_one_token(tokenizer: ByteLevelTokenizer, reference: Reference) -> None:
    ids = tokenizer.encode([Control(START), Text(START), Control(END)])

    assert ids == [reference.added[START], *reference.encode(START), reference.added[END]]


def test_pieces_are_encoded_apart(tokenizer: ByteLevelTokenizer, reference: Reference) -> None:
    together = tokenizer.encode([Text("assistant")])
    apart = tokenizer.encode([Text("assi"), Text(""), Text("stant")])

    assert apart == reference.encode("assi") + reference.encode("stant")
    assert apart != together


def test_control_ids_are_known_by_their_text(
    tokenizer: ByteLevelTokenizer, reference: Reference
) -> None:
    found = {text: tokenizer.control_id(text) for text in (END_OF_TEXT, START, END, TOOL_CALL)}

    assert found == reference.added
    assert tokenizer.control_id("<|unknown|>") is None


def test_a_tokenizer_is_known_by_the_hash_of_its_file(
    tokenizer: ByteLevelTokenizer, path: Path
) -> None:
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {
            "truncation": {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 0}},
                ],
                "special_tokens": {
                    END_OF_TEXT: {"id": END_OF_TEXT, "ids": [700], "tokens": [END_OF_TEXT]}
                },
            }
        },
    ],
    ids=["truncation", "padding", "post_processor"],
)
def test_a_rule_in_the_file_neither_cuts_nor_fills_nor_adds(
    tmp_path: Path, reference: Reference, changes: dict[str, Any]
) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", **changes)
    text = "A red cube on a table; the red cube, the table."

    ids = ByteLevelTokenizer(path, "models/m").encode([Text(text)])

    assert ids == reference.encode(text)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, decoder: object) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", decoder=decoder)

    with pytest.raises(ModelUnavailable, match=r"models/m/tokenizer\.json is not byte-level BPE"):
        ByteLevelTokenizer(path, "models/m")


def test_a_byte_level_decoder_inside_a_sequence_is_byte_level(
    tmp_path: Path, reference: Reference
) -> None:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    sequence = {"type": "Sequence", "decoders": [byte_level]}
    path = write_tokenizer(tmp_path / "tokenizer.json", decoder=sequence)

    ids = ByteLevelTokenizer(path, "models/m").encode([Text("a red cube")])

    assert ids == reference.encode("a red cube")


# --- decoding ----------------------------------------------------------------------------------


def shown(tokenizer: ByteLevelTokenizer, ids: Sequence[int]) -> str:
    """The text of a stream that hands over one token at a time."""
    decoder = TextDecoder()
    texts = [decoder.feed(tokenizer.token_bytes(one)) for one in ids]
    return "".join([*texts, decoder.finish()])


def test_every_token_stands_for_its_bytes(
    tokenizer: ByteLevelTokenizer, reference: Reference
) -> None:
    for token_id in reference.vocabulary.values():
        assert tokenizer.token_bytes(token_id) == reference.bytes_of(token_id)
    for text, token_id in reference.added.items():
        assert tokenizer.token_bytes(token_id) == text.encode()


def test_an_id_beyond_the_vocabulary_stands_for_no_bytes(
    tokenizer: ByteLevelTokenizer, reference: Reference
) -> None:
    beyond = len(reference.vocabulary) + len(reference.added)

    assert tokenizer.token_bytes(beyond) == b""


@settings(max_examples=1000, **PATIENT)
@given(data=st.data())
def test_any_ids_fed_one_by_one_are_the_text_of_their_bytes_together(
    tokenizer: ByteLevelTokenizer, reference: Reference, data: st.DataObject
) -> None:
    # Two thirds are tokens of single bytes, so that broken UTF-8 of every form occurs.
    single = st.integers(0, 255)
    vocabulary = st.integers(0, len(reference.vocabulary) + len(reference.added) + 1)
    ids = data.draw(st.lists(single | single | vocabulary, max_size=12))

    text = shown(tokenizer, ids)

    assert text == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")


@settings(max_examples=1000, **PATIENT)
@given(text=TEXTS)
def test_a_texts_ids_fed_one_by_one_are_the_text_again(
    tokenizer: ByteLevelTokenizer, published: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode([Text(text), Control(END)])

    text_again = shown(tokenizer, ids)

    assert text_again == unicodedata.normalize("NFC", text) + END
    assert text_again == published.decode(ids, skip_special_tokens=False)


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    decoder = TextDecoder()

    texts = [decoder.feed(bytes([byte])) for byte in "é👍".encode()]

    assert texts == ["", "é", "", "", "", "👍"]
    assert decoder.finish() == ""


def test_an_unfinished_character_at_the_end_is_one_replacement() -> None:
    decoder = TextDecoder()

    assert decoder.feed("👍".encode()[:3]) == ""
    assert decoder.finish() == "\ufffd"
