"""Weights of terms and texts of many tokens, for both of SDXL's text encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rendering import load
from tests.sdxl_jobs import done, params, there
from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.media.prompts import Prompts, Text, prompt_of
from worker.engine.media.weighting import weighing
from worker.engine.peaks import LiveBytes, measure
from worker.errors import PromptTooLong
from worker.protocol.messages import WeightedTerm
from worker.vram.sizes import Peaks

CPU = torch.device("cpu")
WORDS = ("a", "red", "circle", "blue", "square", "green", "star")  # of one token each


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return media_catalog(load_settings("demo", {})).default("sdxl")


@pytest.fixture(scope="module")
def loaded(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(spec, tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    with there(loaded, ("text_encoder", "text_encoder_2")):
        yield loaded


def of_tokens(count: int) -> str:
    """A text of so many tokens."""
    return " ".join(WORDS[(number * number) % len(WORDS)] for number in range(count))


def terms(*pairs: tuple[str, float]) -> dict[str, Any]:
    return {"weighted": tuple(WeightedTerm(text, weight) for text, weight in pairs)}


def plainly(model: Any, text: str, negative: str | None = "a square") -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        made: tuple[torch.Tensor, ...] = model._pipeline.encode_prompt(
            prompt=text, negative_prompt=negative, device=CPU, do_classifier_free_guidance=True
        )
    return made


# --- weights --------------------------------------------------------------------------------------


def test_terms_follow_the_prompt_each_after_a_comma() -> None:
    text = prompt_of(params(prompt="a circle", **terms(("red", 1.3), ("large", 0.5))))
    assert text == Text(("a circle", ", ", "red", ", ", "large"), (1, 1, 1.3, 1, 0.5))
    assert text.whole == "a circle, red, large"
    assert prompt_of(params(prompt="", **terms(("red", 2), ("large", 1)))).whole == "red, large"


@pytest.mark.parametrize(
    "text", ["a red circle", "", "no way!!", "(a red circle:1.3) and [blue]++ --", "✨ é, ñ!,"]
)
def test_a_text_without_weights_is_the_pipelines_own_to_the_bit_whichever_way_it_goes(
    text: str, model: Any, tmp_path: Path
) -> None:
    job = params(prompt=text, **terms(("shiny!", 1.0), (" ,large", 1.0)))
    whole = prompt_of(job)
    expected = plainly(model, whole.whole)

    own = model.encode(job, EmbeddingCache(tmp_path))
    with torch.inference_mode():
        through_compel = model._prompts._in_pieces(job, whole, 1, CPU)

    assert all(map(torch.equal, own.values(), expected))
    assert all(map(torch.equal, through_compel, expected))


def test_nothing_in_the_prompt_is_syntax(model: Any) -> None:
    """The weights of one term do not change what parentheses and signs in the prompt are."""
    job = params(prompt="(a red circle)1.3 and blue++", **terms(("large", 1.5)))
    whole = prompt_of(job)
    with torch.inference_mode():
        hidden, _ = model._prompts._of(whole, 1, CPU)
    expected = plainly(model, whole.whole)[0]

    # Everything before the term is what it would be without weights: states look back only.
    same = (hidden == expected).all(-1)[0].tolist()
    begins = model.token_counts(job.prompt + ", ")["tokenizer"] - 1
    assert same == [True] * begins + [False] + [True] * (77 - begins - 1)


def test_more_weight_moves_a_terms_states_away_from_those_of_nothing(model: Any) -> None:
    job = params(prompt="a circle", **terms(("red", 1.7)))
    with torch.inference_mode():
        hidden, pooled = model._prompts._of(prompt_of(job), 1, CPU)
        nothing = plainly(model, "")[0]
        plain, _, plain_pooled, _ = plainly(model, "a circle, red")

    place = 4  # begin, a, circle, comma
    weighted = nothing + (plain - nothing) * 1.7
    assert torch.equal(hidden[0, place], weighted[0, place])
    assert torch.equal(hidden[0, :place], plain[0, :place])
    assert torch.equal(hidden[0, place + 1 :], plain[0, place + 1 :])
    assert torch.equal(pooled, plain_pooled)


def test_less_weight_mixes_with_a_text_in_which_the_term_is_not_read(model: Any) -> None:
    encoder, tokenizer = model._pipeline.text_encoder, model._pipeline.tokenizer
    job = params(prompt="a circle", **terms(("red", 0.4)))
    ids = tokenizer("a circle, red", padding="max_length", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    with torch.inference_mode():
        hidden, _ = model._prompts._of(prompt_of(job), 1, CPU)
        plain, masked, nothing = (
            encoder(one, reading, output_hidden_states=True).hidden_states[-2]
            for one, reading in (
                (ids, None),
                (ids, mask),
                (tokenizer("", padding="max_length", return_tensors="pt").input_ids, None),
            )
        )
        for one in (plain, masked):
            one[0, 4] = nothing[0, 4] + (one[0, 4] - nothing[0, 4]) * 0.4
    share = math.tan(0.6 * math.pi / 2)
    expected = (plain + share * masked) / (1 + share)

    width = expected.shape[-1]
    assert torch.allclose(hidden[..., :width], expected, atol=1e-5)
    assert not torch.allclose(plain, masked, atol=1e-2)  # masking the term does something


def test_pictures_follow_the_weight(loaded: Any, tmp_path: Path) -> None:
    def made(weight: float) -> Any:
        job = params(
            prompt="a small red circle on the left", negative_prompt=None, width=128, height=128,
            steps=6, seed=5, **terms(("a large blue square on the right", weight)),
        )  # fmt: skip
        return done(loaded, job, tmp_path)[0][0].astype(int)

    def blue(picture: Any) -> int:
        return int((picture[..., 2] - picture[..., 0] > 60).sum())

    assert blue(made(0.0)) == 0 < 100 < blue(made(1.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_terms_that_count_for_nothing_are_numbers_in_half_precision_too(
    dtype: str, spec: ModelSpec, tmp_path: Path
) -> None:
    model = load(replace(spec, dtype=dtype), tmp_path)
    job = params(**terms(("red", 0.0), ("blue", 0.0), ("green", 1.5)))
    with there(model, ("text_encoder", "text_encoder_2")):
        made = model.encode(job, EmbeddingCache(tmp_path))

    for tensor in made.values():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.isfinite(tensor).all()


# --- many tokens ----------------------------------------------------------------------------------


def test_75_tokens_are_read_at_once_and_76_in_two_pieces(model: Any, tmp_path: Path) -> None:
    short, long = params(prompt=of_tokens(75)), params(prompt=of_tokens(76))
    cache = EmbeddingCache(tmp_path)

    at_once = model.encode(short, cache)
    in_two = model.encode(long, cache)

    assert all(map(torch.equal, at_once.values(), plainly(model, short.prompt)))
    assert at_once["prompt_embeds"].shape[1] == 77
    assert in_two["prompt_embeds"].shape[1] == 154
    assert in_two["negative_prompt_embeds"].shape[1] == 154


def test_pieces_are_read_one_by_one_and_the_shorter_text_is_followed_by_nothing(
    model: Any, tmp_path: Path
) -> None:
    job = params(prompt=of_tokens(170), negative_prompt="a square")
    made = model.encode(job, EmbeddingCache(tmp_path))

    expected: list[list[torch.Tensor]] = [[], []]
    for number, one in enumerate(("", "_2")):
        tokenizer = getattr(model._pipeline, f"tokenizer{one}")
        encoder = getattr(model._pipeline, f"text_encoder{one}")
        ids = tokenizer(job.prompt, add_special_tokens=False, verbose=False).input_ids
        for begin in (0, 75, 150):
            piece = [tokenizer.bos_token_id, *ids[begin : begin + 75], tokenizer.eos_token_id]
            piece += [tokenizer.pad_token_id] * (77 - len(piece))
            with torch.inference_mode():
                out = encoder(torch.tensor([piece]), output_hidden_states=True)
            expected[number].append(out.hidden_states[-2])
            if number == 1 and begin == 0:
                pooled = out.text_embeds
    hidden = torch.cat([torch.cat(pieces, dim=1) for pieces in expected], dim=-1)
    negative, nothing = plainly(model, "", "a square")[1], plainly(model, "")[0]

    assert torch.equal(made["prompt_embeds"], hidden)
    assert torch.equal(made["pooled_prompt_embeds"], pooled)
    assert torch.equal(made["negative_prompt_embeds"][:, :77], negative)
    assert torch.equal(made["negative_prompt_embeds"][:, 77:154], nothing)
    assert torch.equal(made["negative_prompt_embeds"][:, 154:], nothing)


def test_without_a_negative_prompt_what_the_model_reads_instead_is_as_long(
    model: Any, tmp_path: Path
) -> None:
    job = params(prompt=of_tokens(100), negative_prompt=None)
    made = model.encode(job, EmbeddingCache(tmp_path))

    assert made["negative_prompt_embeds"].shape == made["prompt_embeds"].shape
    assert not made["negative_prompt_embeds"].any()  # this model's own setting


def test_a_long_negative_prompt_lengthens_the_prompt_only_where_it_is_read(
    model: Any, tmp_path: Path
) -> None:
    job = params(negative_prompt=of_tokens(100))
    guided = model.encode(job, EmbeddingCache(tmp_path))
    alone = model.encode(
        params(negative_prompt=of_tokens(100), guidance_scale=1.0), EmbeddingCache(tmp_path)
    )

    assert guided["prompt_embeds"].shape[1] == 154
    assert alone["prompt_embeds"].shape[1] == 77
    assert alone.keys() == {"prompt_embeds", "pooled_prompt_embeds"}


@pytest.mark.parametrize("weight", [1.4, 0.4])
def test_a_term_over_the_border_of_two_pieces_has_its_weight_in_both(
    weight: float, model: Any
) -> None:
    job = params(prompt=of_tokens(72), **terms(("red blue green star", weight)))
    text = prompt_of(job)
    with torch.inference_mode():
        weighted, _ = model._prompts._of(text, 2, CPU)
        plain, _ = model._prompts._of(Text((text.whole,), (1.0,)), 2, CPU)
    provider = weighing(model._pipeline.tokenizer, model._pipeline.text_encoder)

    # 72 tokens and a comma: places 74 and 75 of the first piece, 1 and 2 of the second.
    assert provider._get_token_ranges_for_fragments([], text.parts)[-1] == (74, 77 + 2)
    differ = (weighted != plain).any(-1)[0]
    if weight > 1:
        assert differ.nonzero().flatten().tolist() == [74, 75, 78, 79]
    else:
        assert differ[[74, 75, 78, 79]].all()
        assert torch.allclose(weighted[0, :74], plain[0, :74], atol=1e-5)  # mixed with themselves


def test_more_than_20_pieces_are_refused_with_the_numbers(model: Any) -> None:
    model.check(params(prompt=of_tokens(1500)))
    with pytest.raises(PromptTooLong, match=r"has 1501 tokens and .* takes 1500"):
        model.check(params(prompt=of_tokens(1501)))
    with pytest.raises(PromptTooLong, match="has 1502 tokens"):
        model.given(params(prompt=of_tokens(1500), **terms(("red", 1.0))), ())


def test_a_profile_that_refuses_long_prompts_takes_75_tokens(
    spec: ModelSpec, tmp_path: Path
) -> None:
    from worker.engine.leases import alone
    from worker.engine.media.sdxl import Sdxl

    model = Sdxl(spec, CPU, tmp_path, alone(1 << 34), long_prompts="refuse")
    assert model.token_counts(of_tokens(75)) == {"tokenizer": 77, "tokenizer_2": 77}
    with pytest.raises(PromptTooLong, match=r"has 76 tokens and .* takes 75"):
        model.token_counts(of_tokens(76))
    with pytest.raises(PromptTooLong, match="has 76 tokens"):
        model.given(params(prompt=of_tokens(74), **terms(("red", 1.0))), ())


def test_tokens_and_pieces_are_told_of_the_whole_prompt(model: Any) -> None:
    job = params(prompt=of_tokens(74), negative_prompt="a square", **terms(("red", 1.2)))
    assert model.given(job, ()).receipt == {
        "prompt_tokens": {"tokenizer": 78, "tokenizer_2": 78},
        "negative_prompt_tokens": {"tokenizer": 4, "tokenizer_2": 4},
        "text_pieces": 2,
    }


def test_a_long_prompt_is_painted(loaded: Any, tmp_path: Path) -> None:
    """The words after the first piece are read: they decide what is there."""
    filling = "a photo of light, lens, quality, " * 13

    def made(text: str) -> Any:
        job = params(prompt=text, negative_prompt=None, width=128, height=128, steps=6)
        return done(loaded, job, tmp_path)[0][0].astype(int)

    red, blue = made(filling + "a red circle"), made(filling + "a blue circle")
    assert loaded.token_counts(filling)["tokenizer"] > 77
    assert (red[..., 0] - red[..., 2]).max() > 100
    assert (blue[..., 2] - blue[..., 0]).max() > 100


# --- what is kept and what is leased --------------------------------------------------------------


def test_embeddings_are_known_by_everything_that_decides_them(model: Any, tmp_path: Path) -> None:
    jobs = [
        params(),
        params(**terms(("red", 1.2))),
        params(**terms(("red", 1.3))),
        params(**terms(("red", 1.2), ("blue", 1.0))),
        params(**terms(("blue", 1.0), ("red", 1.2))),
        params(prompt="a red circle, red"),
        params(prompt=of_tokens(80)),
        params(negative_prompt=of_tokens(80)),
    ]
    cache = EmbeddingCache(tmp_path)
    for job in jobs:
        assert model.known_texts(job, cache) is None
        made = model.encode(job, cache)
        found = model.known_texts(job, EmbeddingCache(tmp_path))
        assert found is not None
        assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


@pytest.mark.parametrize(
    "more",
    [
        terms(("red", 0.5), ("blue", 0.2), ("green", 1.5), ("star", 0.9)),
        {"prompt": of_tokens(700)},
        {"prompt": of_tokens(300), **terms(("red", 0.5), ("blue", 0.2))},
    ],
)
def test_a_lease_covers_what_weighing_and_pieces_take(
    more: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    job = params(**more)
    encoders = [model._pipeline.text_encoder, model._pipeline.text_encoder_2]
    peaks = Peaks(tmp_path, lambda questions: [measure(one) for one in questions])
    leased = peaks.of_phase(model.phases(job)["encode"])
    plain = peaks.of_phase(model.phases(params())["encode"])

    weights = [one for encoder in encoders for one in (*encoder.parameters(), *encoder.buffers())]
    with LiveBytes(weights) as live:
        model.encode(job, EmbeddingCache(tmp_path))

    assert plain < live.peak <= leased < 8 * live.peak


def test_the_denoisers_pass_is_measured_with_the_length_of_the_text(model: Any) -> None:
    short, long = (model.phases(params(prompt=of_tokens(n)))["denoise"] for n in (10, 400))
    assert short.passes[0].tokens == 77
    assert long.passes[0].tokens == 6 * 77
    assert measure(long.passes[0]).peak_bytes > measure(short.passes[0]).peak_bytes
    width = model._configs["unet"]["cross_attention_dim"]
    assert long.beside_bytes - short.beside_bytes == 2 * 5 * 77 * width * 4


def test_counting_needs_no_device(model: Any) -> None:
    prompts = Prompts(model._pipeline, "chunk")
    assert prompts.pieces(params(prompt=of_tokens(150))) == 2
    assert prompts.pieces(params(prompt=of_tokens(151))) == 3
    assert np.array_equal(prompts.counts("a red circle!")["tokenizer"], 6)
