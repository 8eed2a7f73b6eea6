"""Counts of the gateway against reference tokenizers, and texts after compression.

    python scripts/check_token_counts.py [--texts 10000] [--clip-bpe FILE] [--out FILE]

Reference: the class of transformers that the worker's pipelines load for the same files, and for
CLIP also its algorithm written out again here in plain Python, since the former shares its core
with the gateway's counter. The demo models' vocabularies are small; the published one of CLIP
is checked with its file bpe_simple_vocab_16e6.txt.gz, which the package open_clip_torch carries
(MIT, 1.36 MB).

After compression each text is counted by the reference again: none may be over the limit, and no
protected part may be missing, but where those parts alone are over it, which is told (`unfit`).
The exit status is 1 if any count differs, is over, or any part is lost.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import platform
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import regex

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gateway.tokens.compress import compress
from gateway.tokens.counters import FileCounter, TokenCounters
from gateway.tokens.protect import locate, protected_spans

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("Maya Lindqvist", "José", "美咲", "ohwx woman", "Ann")
LIMITS = {"clip": 75, "clip-published": 75, "umt5": 100, "qwen": 200}
PUBLISHED_VOCABULARY = 49152  # bytes, bytes that end a word, merges, and two special tokens

_WORDS = (
    "a photo of the red sofa soft window light portrait cinematic long hair standing in rain "
    "street at night neon reflections detailed quiet forest morning fog lens bokeh film grain "
    "woman man holding an umbrella wide shot slow camera pans across the harbour won't it's "
    "extraordinarily photorealistic chiaroscuro 85mm 4k f/1.8 1,000 0.5 e.g. Dr. state-of-the-art"
).split()
_TAGS = ("masterpiece", "best quality", "1girl", "solo", "looking_at_viewer", "8k", "!!!", "?!")
_EMOJI = ("👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👍🏽", "🇸🇪🇯🇵", "❤️‍🔥", "🙂", "①", "☂︎")
_CJK = ("雨の中の少女", "霓虹灯下的街道", "비 오는 거리", "東京タワー、夜景。", "ﾊﾝｶｸ", "한국어")
_MARKS = (
    "e\u0301te\u0301",
    "Z\u0351\u036b\u0343a\u0335l\u0321go",
    "नमस्ते",
    "ক্ষ",
    "กำลัง",
    "ﷺ",
    "ﬁn",
    "İstanbul",
)
_RIGHT_TO_LEFT = ("שלום עולם", "مرحبا، بالعالم", "\u202bفارسی\u202c", "אבג؛ דהו")
_BLANKS = ("   ", "\t\t", "\n\n\n", "\u00a0\u3000", "\u2003 \u2028", "\r\n")
_CONTROLS = ("\x00", "\x1b[0m", "\ufeff", "\u200b", "\x7f", "\u0085")
_SPECIALS = ("<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<|im_end|>", "<|ENDOFTEXT|>")
_KEPT = (
    "<lora:add_detail:0.8>", "(red scarf:1.3)", '"OPEN 24 HOURS"', "“Café de Flore”", "{{style}}",
    "Maya Lindqvist", "José", "Jose\u0301", "美咲", "ohwx woman", "((glow))", "「出口」", "neon++",
)  # fmt: skip


def texts(count: int, seed: int = 20261126) -> Iterator[str]:
    """`count` texts, the same for the same seed: clauses, tags, emoji, East Asian and right-to-left
    scripts, combining marks, runs of blanks, control characters, special tokens, very long ones."""
    draw = random.Random(seed)
    parts: tuple[Callable[[], str], ...] = (
        lambda: " ".join(draw.choices(_WORDS, k=draw.randint(1, 12))),
        lambda: ",".join(draw.choices(_TAGS, k=draw.randint(1, 5))),
        *(lambda kind=kind: draw.choice(kind) for kind in (
            _EMOJI, _CJK, _MARKS, _RIGHT_TO_LEFT, _BLANKS, _CONTROLS, _SPECIALS, _KEPT, _KEPT)),
        lambda: "".join(_any_character(draw) for _ in range(draw.randint(1, 6))),
    )  # fmt: skip
    weights = (12, 4, 2, 2, 2, 2, 1, 1, 1, 4, 4, 1)
    joints = (", ", ". ", " ", "; ", "", "\n", "、")
    for number in range(count):
        if number % 500 == 499:  # one word without end, or a page
            yield draw.choice(("x" * 3000, "雨" * 1500, " ".join(draw.choices(_WORDS, k=2000))))
            continue
        pieces = []
        for part in draw.choices(parts, weights, k=draw.choice((1, 2, 4, 8, 16, 32))):
            pieces += [part(), draw.choices(joints, (10, 3, 4, 2, 1, 1, 1))[0]]
        yield "".join(pieces)


def _any_character(draw: random.Random) -> str:
    while True:
        char = chr(draw.randrange(0x20, 0x30000))
        if unicodedata.category(char) not in ("Cs", "Cn", "Co"):
            return char


def write_published_clip(bpe: Path, folder: Path) -> None:
    """The published vocabulary as a checkpoint has it: vocab.json and merges.txt, in `tokenizer`
    and, padding with "!", in `tokenizer_2`."""
    lines = gzip.decompress(bpe.read_bytes()).decode().split("\n")
    merges = lines[1 : PUBLISHED_VOCABULARY - 256 - 2 + 1]
    letters = list(_printable_bytes().values())
    names = letters + [letter + "</w>" for letter in letters]
    names += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        inner = folder / name
        inner.mkdir(parents=True)
        vocabulary = {token: number for number, token in enumerate(names)}
        (inner / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        (inner / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
        (inner / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@functools.cache
def _printable_bytes() -> dict[int, str]:
    """Byte-level BPE's alphabet, in the order of CLIP's first 256 tokens."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


class PlainClip:
    """CLIP's algorithm in plain Python (Radford et al. 2021), with the normalisation that
    transformers gives it."""

    _WORD = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    )

    def __init__(self, merges: Sequence[tuple[str, str]], specials: Sequence[str]):
        self._rank = {merge: number for number, merge in enumerate(merges)}
        self._special = regex.compile("|".join(map(regex.escape, specials)))
        self._known: dict[str, int] = {}

    def count(self, text: str) -> int:
        ends = [match.span() for match in self._special.finditer(text)]
        total, at = len(ends), 0
        for begin, end in [*ends, (len(text), len(text))]:
            plain = unicodedata.normalize("NFC", text[at:begin])
            # Letter by letter, as the Rust library does: no final sigma.
            lowered = "".join(char.lower() for char in regex.sub(r"\s+", " ", plain))
            total += sum(self._tokens(word) for word in self._WORD.findall(lowered))
            at = end
        return total

    def _tokens(self, word: str) -> int:
        if word not in self._known:
            # The name of a special token that lower-casing made is a word, and the byte-level step
            # splits it once more.
            parts = ("<|", word[2:-2], "|>") if word.endswith("oftext|>") else (word,)
            self._known[word] = sum(map(self._merged, parts))
        return self._known[word]

    def _merged(self, word: str) -> int:
        parts = [_printable_bytes()[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self._rank.get(pair, sys.maxsize))
            if best not in self._rank:
                break
            made, at = [], 0
            while at < len(parts):
                joined = tuple(parts[at : at + 2]) == best
                made.append(parts[at] + parts[at + 1] if joined else parts[at])
                at += 2 if joined else 1
            parts = made
        return len(parts)


def plain_clip(folder: Path) -> PlainClip:
    """Of a folder that transformers loads as CLIP's."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    model = json.loads(loaded.backend_tokenizer.to_str())["model"]
    specials = sorted(set(loaded.all_special_tokens))
    return PlainClip([tuple(merge) for merge in model["merges"]], specials)


def reference(*folders: Path, splits_specials: bool = False) -> Callable[[str], int]:
    """Tokens by transformers; of several encoders the most."""
    from transformers import AutoTokenizer

    loaded = [
        AutoTokenizer.from_pretrained(one, split_special_tokens=splits_specials) for one in folders
    ]

    def count(text: str) -> int:
        return max(
            len(one(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
            for one in loaded
        )

    return count


@dataclass(frozen=True, slots=True)
class Row:
    tokenizer: str
    texts: int
    equal: int  # to transformers
    equal_to_plain: int | None  # to CLIP's algorithm in plain Python
    limit: int
    were_over: int  # before compression
    over: int  # after it
    protected_parts: int
    lost: int
    unfit: int  # texts whose protected parts alone are over the limit
    cut_over: int  # beginnings of `cut` that are over their limit
    microseconds_per_count: float  # of a prompt of 60 tokens, not from the cache


def check(
    name: str,
    counter: FileCounter,
    expected: Callable[[str], int],
    plain: Callable[[str], int] | None,
    sample: Sequence[str],
    limit: int,
) -> Row:
    equal = equal_to_plain = were_over = over = parts = lost = unfit = cut_over = 0
    for text in sample:
        count = expected(text)
        equal += counter.count(text) == count
        equal_to_plain += plain is not None and counter.count(text) == plain(text)
        were_over += count > limit
        beginning = counter.cut(text, limit // 3)
        cut_over += expected(beginning) > limit // 3 or not text.startswith(beginning)
        protected = protected_spans(text, NAMES)
        result = compress(text, limit=limit, counter=counter, protected=protected)
        parts += len(protected)
        lost += sum(part not in result.text for part in protected)
        unfit += not result.fits
        over += result.fits and expected(result.text) > limit
        # Unfit is only what does not fit: the parts alone, each once.
        if not result.fits:
            alone = {text[one.start : one.end] for one in locate(text, protected)}
            over += expected(" ".join(sorted(alone))) <= limit
    return Row(
        tokenizer=name,
        texts=len(sample),
        equal=equal,
        equal_to_plain=None if plain is None else equal_to_plain,
        limit=limit,
        were_over=were_over,
        over=over,
        protected_parts=parts,
        lost=lost,
        unfit=unfit,
        cut_over=cut_over,
        microseconds_per_count=_microseconds(counter),
    )


def _microseconds(counter: FileCounter, rounds: int = 300) -> float:
    """Best of five, of the processor's time: other programs' is not counted."""
    prompt = counter.cut("a woman with a red umbrella in the rain, soft window light, " * 20, 60)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(rounds):
            counter.counted(prompt)
        best = min(best, (time.process_time() - began) / rounds * 1e6)
    return round(best, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--models", type=Path, default=REPOSITORY / "models")
    parser.add_argument("--clip-bpe", type=Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "token-counts.json")
    given = parser.parse_args(arguments)
    sample = list(texts(given.texts, given.seed))
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(_rows(given.models, given.clip_bpe, Path(temporary), sample))
    _print(rows)
    found: dict[str, Any] = {
        "texts": given.texts,
        "seed": given.seed,
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
        "rows": [asdict(row) for row in rows],
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return int(any(is_wrong(row) for row in rows))


def is_wrong(row: Row) -> bool:
    differs = row.equal < row.texts or row.equal_to_plain not in (None, row.texts)
    return differs or bool(row.over or row.lost or row.cut_over)


def _rows(
    models: Path, clip_bpe: Path | None, temporary: Path, sample: Sequence[str]
) -> Iterator[Row]:
    files = {"clip": models / "demo-image", "umt5": models / "demo-video"}
    files["qwen"] = models / "demo-chat"
    if clip_bpe is not None:
        files["clip-published"] = temporary / "clip"
        write_published_clip(clip_bpe, files["clip-published"])
    counters = TokenCounters(files)
    counters.load_all()
    for name, folder in files.items():
        counter = counters.of(name)
        if not isinstance(counter, FileCounter):
            raise SystemExit(f"{folder} has no tokenizer")
        inner = sorted(folder.glob("tokenizer*/")) or [folder]
        inner = inner if inner[0].is_dir() else [folder]
        expected = reference(*inner, splits_specials=name == "qwen")
        plain = _plain(inner) if name.startswith("clip") else None
        yield check(name, counter, expected, plain, sample, LIMITS[name])


def _plain(folders: Sequence[Path]) -> Callable[[str], int]:
    loaded = [plain_clip(one) for one in folders]
    return lambda text: max(one.count(text) for one in loaded)


def _print(rows: Sequence[Row]) -> None:
    head = ("tokenizer", "texts", "equal", "equal, plain", "limit", "were over", "over", "parts")
    print("  ".join(f"{word:>14}" for word in (*head, "lost", "unfit", "cut over", "us/count")))
    for row in rows:
        shown = ("-" if value is None else value for value in asdict(row).values())
        print("  ".join(f"{value:>14}" for value in shown))


if __name__ == "__main__":
    sys.exit(main())
