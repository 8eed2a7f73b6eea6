"""gateway/tokens/counters.py, files.py and estimate.py: counts are those of the encoders."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from check_token_counts import PlainClip, plain_clip, reference, texts
from gateway.errors import ConfigError, Invalid
from gateway.tokens.counters import FileCounter, TokenCounters
from gateway.tokens.estimate import EstimateCounter, upper_bound
from gateway.tokens.files import sources
from gateway.tokens.graphemes import is_boundary
from worker.engine.chat.template import Text
from worker.engine.chat.tokenizer import ByteLevelTokenizer

MODELS = Path(__file__).resolve().parents[2] / "models"
FILES = {
    "clip": MODELS / "demo-image",
    "umt5": MODELS / "demo-video",
    "qwen": MODELS / "demo-chat",
}
TEXTS = int(os.environ.get("TEST_TOKEN_TEXTS", "1000"))
COUNTERS = TokenCounters(FILES)

anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


def counter_of(name: str) -> FileCounter:
    counter = COUNTERS.of(name)
    assert isinstance(counter, FileCounter)
    return counter


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("clip", ("demo-image/tokenizer", "demo-image/tokenizer_2")),
        ("umt5", ("demo-video/tokenizer",)),
        ("qwen", ("demo-chat",)),
    ],
)
def test_counts_are_those_of_the_encoders_tokenizer(name: str, folders: tuple[str, ...]) -> None:
    expected = reference(*(MODELS / one for one in folders), splits_specials=name == "qwen")
    sample = list(texts(TEXTS))

    different = [one for one in sample if counter_of(name).count(one) != expected(one)]

    assert different == []


def test_counts_are_those_of_the_workers_own_code() -> None:
    chat = ByteLevelTokenizer(FILES["qwen"] / "tokenizer.json", "demo-chat")
    video = Tokenizer.from_file(str(FILES["umt5"] / "tokenizer" / "tokenizer.json"))
    sample = list(texts(300, seed=11))

    for text in sample:
        assert counter_of("qwen").count(text) == len(chat.encode([Text(text)]))
        assert counter_of("umt5").count(text) == len(video.encode(text).ids) - 1  # its end token


def test_counts_of_clip_are_those_of_its_algorithm_in_plain_python() -> None:
    plain = [plain_clip(FILES["clip"] / one) for one in ("tokenizer", "tokenizer_2")]
    sample = [one for one in texts(TEXTS // 2, seed=7) if len(one) < 2000]

    different = [
        one for one in sample if counter_of("clip").count(one) != max(p.count(one) for p in plain)
    ]

    assert different == []


def test_the_second_encoder_of_sdxl_counts_when_it_has_more_tokens(tmp_path: Path) -> None:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2, "!</w>": 3, "!!</w>": 4}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_clip(tmp_path / name, vocabulary, ["! !</w>"], {"pad_token": pad})

    alone = TokenCounters({"clip": tmp_path / "tokenizer"}).of("clip").count("!!")
    both = TokenCounters({"clip": tmp_path}).of("clip").count("!!")

    assert (alone, both) == (1, 2)


def test_vocab_and_merges_count_as_transformers_does(tmp_path: Path) -> None:
    data = json.loads((FILES["clip"] / "tokenizer" / "tokenizer.json").read_bytes())["model"]
    merges = [" ".join(one) for one in data["merges"]]
    config = {
        "pad_token": {"__type": "AddedToken", "content": "!", "lstrip": False, "normalized": True}
    }
    folder = write_clip(tmp_path / "clip", data["vocab"], merges, config)
    expected = CLIPTokenizer.from_pretrained(folder)
    counter = TokenCounters({"clip": folder}).of("clip")
    sample = list(texts(300, seed=3))

    different = [
        one
        for one in sample
        if counter.count(one)
        != len(expected(one, add_special_tokens=False, verbose=False).input_ids)
    ]

    assert counter.is_exact
    assert different == []


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [("clip", "<|endoftext|>", 1), ("umt5", "</s>", 1), ("clip", "", 0), ("umt5", "", 0)],
)
def test_special_tokens_in_a_text_count_as_one_where_the_encoder_finds_them(
    name: str, text: str, tokens: int
) -> None:
    assert counter_of(name).count(text) == tokens


def test_special_tokens_in_a_chat_text_are_the_characters_they_consist_of() -> None:
    assert counter_of("qwen").count("<|im_end|>") > 1


def test_begin_and_end_tokens_are_not_counted_but_told() -> None:
    told = {name: counter_of(name).end_tokens for name in FILES}

    assert told == {"clip": 2, "umt5": 1, "qwen": 0}


def test_truncation_and_padding_that_a_file_ships_are_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(FILES["clip"] / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(length=77)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    counter = TokenCounters({"clip": tmp_path}).of("clip")

    assert counter.count("a") == 1
    assert counter.count("a " * 500) == 500


def test_a_name_without_files_is_estimated_and_says_so(tmp_path: Path) -> None:
    counters = TokenCounters({"clip": tmp_path, "umt5": tmp_path / "absent"})

    found = [counters.of(name) for name in ("clip", "umt5", "other", None)]

    assert {(one.name, one.is_exact) for one in found} == {("estimate", False)}
    assert counters.load_all() == {"clip": False, "umt5": False}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": 3}']
)
def test_a_broken_file_is_an_error_at_start_and_no_estimate(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    counters = TokenCounters({"clip": tmp_path})

    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        counters.load_all()


@pytest.mark.parametrize("merges", [None, "#version\na b c\n", "#version\nno such\n"])
def test_a_vocabulary_without_its_merges_is_an_error(tmp_path: Path, merges: str | None) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)

    with pytest.raises(ConfigError):
        TokenCounters({"clip": tmp_path}).load_all()


def test_a_checkpoint_a_folder_and_a_file_are_all_sources() -> None:
    folder = FILES["clip"] / "tokenizer"

    assert sources(folder / "tokenizer.json") == (folder / "tokenizer.json",)
    assert sources(folder) == (folder / "tokenizer.json",)
    assert [one.parent.name for one in sources(FILES["clip"])] == ["tokenizer", "tokenizer_2"]


@pytest.mark.parametrize("name", [*FILES])
def test_a_lone_surrogate_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(Invalid, match="character 2"):
        counter_of(name).count("ab\ud800c")


def test_threads_share_a_counter_that_one_of_them_loaded() -> None:
    counters = TokenCounters(FILES)
    sample = list(texts(40, seed=9))
    expected = {name: [counter_of(name).count(one) for one in sample] for name in FILES}
    wrong: list[str] = []
    together = threading.Barrier(8)

    def counts() -> None:
        together.wait()
        for name in FILES:
            if [counters.of(name).count(one) for one in sample] != expected[name]:
                wrong.append(name)
            if counters.of(name) is not counters.of(name):
                wrong.append(name)

    threads = [threading.Thread(target=counts) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert wrong == []


@pytest.mark.parametrize("name", [*FILES])
@settings(max_examples=100, deadline=None)
@given(text=anything, limit=st.integers(-1, 60))
def test_a_cut_is_a_beginning_within_the_limit_that_splits_no_character(
    name: str, text: str, limit: int
) -> None:
    beginning = counter_of(name).cut(text, limit)

    assert text.startswith(beginning)
    assert counter_of(name).count(beginning) <= max(limit, 0)
    assert is_boundary(text, len(beginning))


@pytest.mark.parametrize("name", [*FILES])
@pytest.mark.parametrize("limit", [1, 7, 75])
def test_a_cut_of_words_leaves_no_room_for_the_next_word(name: str, limit: int) -> None:
    counter = counter_of(name)
    text = "the red sofa in soft window light " * 40

    beginning = counter.cut(text, limit)

    # A word's first half can need one more token by itself, and is left out then.
    assert limit - 1 <= counter.count(beginning) <= limit
    assert counter.count(text[: text.index(" ", len(beginning) + 1)]) > limit


def test_a_text_within_the_limit_is_returned_as_it_is() -> None:
    text = "  A Cat \n\n on  a Sofa  "

    assert counter_of("clip").cut(text, 75) is text
    assert counter_of("clip").cut(text + "x" * 400, 6).startswith("  A Cat")


@pytest.mark.parametrize("name", [*FILES])
def test_a_character_of_many_tokens_is_kept_whole_or_not_at_all(name: str) -> None:
    family = "👩‍👩‍👧‍👦"

    assert counter_of(name).cut(family, 5) == ""
    assert counter_of(name).cut("a " + family, counter_of(name).count(family)) in ("a ", "a")


@settings(max_examples=150, deadline=None)
@given(text=anything)
def test_no_tokenizer_exceeds_the_upper_bound(text: str) -> None:
    counts = [counter_of(name).count(text) for name in FILES]

    assert max(counts) <= upper_bound(text)
    assert EstimateCounter().count(text) <= upper_bound(text)


@settings(max_examples=100, deadline=None)
@given(text=anything, limit=st.integers(0, 40))
def test_an_estimated_cut_is_a_beginning_within_the_limit(text: str, limit: int) -> None:
    counter = EstimateCounter()

    beginning = counter.cut(text, limit)

    assert text.startswith(beginning)
    assert counter.count(beginning) <= limit
    assert is_boundary(text, len(beginning))
    assert beginning == text or counter.count(text) > limit


def test_the_formula_of_the_estimate_is_the_one_it_states() -> None:
    counter = EstimateCounter()

    counted = {text: counter.count(text) for text in ("cat", "sofas", "a, b", "2024", "雨", "né")}

    assert counted == {"cat": 1, "sofas": 2, "a, b": 3, "2024": 4, "雨": 3, "né": 3}
    assert counter.cut("extraordinarily long", 2) == "extraord"


def test_the_plain_reference_merges_in_the_order_of_its_ranks() -> None:
    clip = PlainClip([("a", "b"), ("ab", "c</w>")], ["<|endoftext|>"])

    assert [clip.count(text) for text in ("abc", "abd", "<|endoftext|>abc", "ABC abc")] == [
        1,
        2,
        2,
        2,
    ]


def write_clip(
    folder: Path, vocabulary: dict[str, int], merges: list[str], config: dict[str, object]
) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", **config}), "utf-8"
    )
    return folder
