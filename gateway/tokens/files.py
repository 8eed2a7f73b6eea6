"""Tokenizer files on disk, and tokenizers made of them that count as the encoders behind them do.

Three kinds, told apart by what a file says and not by its name:

- CLIP (BPE with an end-of-word suffix): the picture's encoder finds its special tokens in a text,
  so `<|endoftext|>` in a prompt is one token. Older checkpoints have vocab.json and merges.txt
  instead of a tokenizer.json; those are read, too.
- Unigram (T5, UMT5): the video's encoder reads its file as it is; `</s>` in a prompt is one token.
- byte-level BPE (chat models): the worker switches its special tokens off for what users write,
  so that nobody forges a turn; `<|im_end|>` in a text is the characters it consists of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gateway.errors import ConfigError

# How CLIP's own code splits a text into words (Radford et al. 2021, simple_tokenizer.py), with the
# digits and signs that it keeps apart.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_CLIP_SPECIALS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def sources(path: Path) -> tuple[Path, ...]:
    """What is to be loaded for `path`; nothing where there are no files.

    path: a tokenizer.json, a folder with one (or with vocab.json and merges.txt), or a checkpoint's
    folder, of which `tokenizer` and `tokenizer_2` are taken: SDXL's two encoders count differently.
    """
    if path.is_file():
        return (path,)
    if found := _in_folder(path):
        return (found,)
    inner = (_in_folder(path / name) for name in ("tokenizer", "tokenizer_2"))
    return tuple(one for one in inner if one is not None)


def _in_folder(folder: Path) -> Path | None:
    names = ("tokenizer.json", "vocab.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load(source: Path) -> Tokenizer:
    """The tokenizer of one of `sources`. Never cuts or pads: a file that ships those rules would
    make every count 77. Raises ConfigError for a file that is broken or incomplete."""
    data = _json(source)
    try:
        if source.name == "vocab.json":
            tokenizer = _clip(source.parent, data)
        else:
            tokenizer = Tokenizer.from_str(json.dumps(_without_controls(data)))
    except ConfigError:
        raise
    # The library raises bare Exception for whatever it cannot read.
    except Exception as exc:
        raise ConfigError(
            f"{source} is not a tokenizer that can be loaded ({type(exc).__name__}: {exc}); "
            "copy the file again, or take its name out of [gateway.tokenizers]"
        ) from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"{path} is not JSON: {exc}; copy the file again") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no JSON object; copy the file again")
    return data


def _without_controls(data: dict[str, Any]) -> dict[str, Any]:
    """The file's data; without its added tokens where it is a chat model's."""
    model = data.get("model")
    has_suffix = isinstance(model, dict) and model.get("end_of_word_suffix")
    if has_suffix or "ByteLevel" not in _types(data.get("decoder")):
        return data
    return {**data, "added_tokens": [], "post_processor": None}


def _types(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders") or ()
    return {str(decoder.get("type")), *(kind for one in inner for kind in _types(one))}


def _clip(folder: Path, vocabulary: dict[str, int]) -> Tokenizer:
    """CLIP's tokenizer of a folder that has vocab.json and merges.txt."""
    path = folder / "merges.txt"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read, and vocab.json is nothing without it") from exc
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, right in pairs]  # another number of parts is a broken file
    specials = _specials(folder)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=str(specials["unk_token"].content),
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials.values()))
    # Counts leave both out; here they only say how many an encoder adds.
    begin, end = (
        (content, int(tokenizer.token_to_id(content) or 0))
        for content in (str(specials[name].content) for name in ("bos_token", "eos_token"))
    )
    tokenizer.post_processor = processors.RobertaProcessing(end, begin, False, False)
    return tokenizer


def _specials(folder: Path) -> dict[str, Any]:
    """The special tokens as the folder names them. SDXL's second encoder pads with "!", which
    makes each "!" of a text a token of its own."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= _json(folder / name)
    found = {}
    for key, default in _CLIP_SPECIALS.items():
        given = config.get(key) or default
        if isinstance(given, dict):
            flags = {
                flag: bool(given[flag])
                for flag in ("single_word", "lstrip", "rstrip", "normalized")
                if flag in given
            }
            found[key] = AddedToken(given["content"], special=True, **flags)
        else:
            found[key] = AddedToken(given, special=True, normalized=False)
    return found
