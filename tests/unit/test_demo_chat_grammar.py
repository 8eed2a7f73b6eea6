"""demo-chat's grammar, vocabulary and checks: what training sees, and what counts as right."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2Tokenizer

from demo_models import chat_words, scenes, small_talk
from demo_models.chat_checks import added, answers_right, contradictions, is_right, judge, style_of
from demo_models.chat_network import new_network
from demo_models.chat_training import Encoder, make_optimizers, passes
from demo_models.chat_vocabulary import MESSAGE_END, VOCABULARY, chat_tokenizer, prompt_words
from demo_models.conversation import (
    Example,
    Message,
    Prompt,
    Source,
    enhancement,
    evaluation_example,
    possible_motions,
    system_prompt,
    talk,
    training_example,
    unknown_word,
    word_count,
)
from demo_models.training import set_learning_rate
from worker.engine.chat.template import find_template
from worker.engine.chat.tokenizer import ByteLevelTokenizer
from worker.protocol.messages import ChatMessage

COLOUR_WORDS = {*scenes.COLOURS, *scenes.BACKGROUNDS, *chat_words.WIDE_COLOURS}


@pytest.fixture(scope="module")
def trained() -> list[Example]:
    chance = random.Random(11)
    return [training_example(chance) for _ in range(1000)]


@pytest.fixture(scope="module")
def evaluated() -> list[Example]:
    chance = random.Random(12)
    return [
        evaluation_example(chance, kind) for _ in range(150) for kind in ("image", "video", "chat")
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return chat_tokenizer()


def enhancements(examples: list[Example]) -> list[tuple[Example, Prompt]]:
    return [(example, example.prompt) for example in examples if example.prompt is not None]


def source(seed: int, *, held_out: bool = False) -> Source:
    return Source(random.Random(seed), held_out=held_out)


# --- what the grammar says -----------------------------------------------------------------------


def test_the_same_seed_makes_the_same_conversations() -> None:
    first, second = random.Random(3), random.Random(3)

    assert [training_example(first) for _ in range(50)] == [
        training_example(second) for _ in range(50)
    ]


def test_every_answer_of_the_grammar_passes_the_checks(
    trained: list[Example], evaluated: list[Example]
) -> None:
    for example in [*trained, *evaluated]:
        if example.kind == "chat":
            assert answers_right(example, example.answer), example
        else:
            verdict = judge(example, example.answer)
            assert is_right(verdict) and verdict.copies and not verdict.repeats, (example, verdict)


def test_an_enhancement_adds_no_colour_and_no_number(trained: list[Example]) -> None:
    for example, prompt in enhancements(trained):
        rest = example.answer.lower().replace(prompt.text.lower(), "", 1)
        for phrase in ("35mm photograph", "50mm lens", "24 frames per second", "long take"):
            rest = rest.replace(phrase, "")
        words = set(re.findall(r"\w+", rest))

        assert not words & COLOUR_WORDS, example
        assert not words & {*chat_words.COUNTS, *map(str, range(100))}, example


def test_an_answer_stays_within_the_words_or_tokens_that_the_system_prompt_allows(
    trained: list[Example],
) -> None:
    seen = Counter[str]()
    for example, _ in enhancements(trained):
        for number, unit in re.findall(r"(\d+) (words|tokens)", example.messages[0].content):
            factor = {"words": 1.0, "tokens": 0.7}[unit]
            assert word_count(example.answer) <= int(number) * factor, example
            seen[unit] += 1

    assert min(seen.values()) > 50


def test_an_answer_uses_much_of_its_budget(trained: list[Example]) -> None:
    used = [
        word_count(example.answer) / example.budget
        for example, _ in enhancements(trained)
        if example.budget and example.budget <= 50
    ]

    assert 0.6 < sum(used) / len(used) < 0.9


def test_answers_without_a_budget_have_some_thirty_words(trained: list[Example]) -> None:
    for example, prompt in enhancements(trained):
        if example.budget is None:
            extra = max(0, word_count(prompt.text) - 25)
            assert 18 <= word_count(example.answer) <= 40 + extra, example


def test_a_video_answer_adds_a_motion_only_to_what_does_not_move_yet(
    trained: list[Example],
) -> None:
    for example, prompt in enhancements(trained):
        parts = added(prompt, example.answer)
        motions = [
            part for part in parts if any(part in all_ for all_ in scenes.MOTION_WORDS.values())
        ]
        wanted = example.kind == "video" and not prompt.moves and prompt.fits != "fixed"
        assert len(motions) == int(wanted), example


def test_no_circle_is_made_to_turn() -> None:
    chance = random.Random(1)
    for _ in range(500):
        wanted = scenes.random_description(chance)
        ways = possible_motions(wanted)

        assert ways
        if any(thing.shape == "circle" for thing in wanted.things):
            assert "turning" not in ways


@pytest.mark.parametrize(
    ("place", "ways"),
    [("left", ("right",)), ("right", ("left",)), ("top", ("down",)), ("bottom", ("up",))],
)
def test_a_circle_with_a_place_moves_away_from_it(place: str, ways: tuple[str, ...]) -> None:
    wanted = scenes.Description((scenes.Thing("circle", "red", None, place),))

    assert possible_motions(wanted) == ways


def test_some_conversations_are_long(trained: list[Example]) -> None:
    lengths = [sum(word_count(m.content) for m in example.messages) for example in trained]

    assert sum(length > 120 for length in lengths) > 20


# --- what is held out ----------------------------------------------------------------------------


def test_training_and_evaluation_share_no_wording() -> None:
    tables = [
        value
        for name, value in vars(chat_words).items()
        if name.endswith(
            ("ROLES", "TASKS", "RULES", "BUDGETS", "REQUESTS", "WRAPPERS", "VERBS", "TEXTS", "AIMS")
        )
    ]
    tables += [small_talk.CHAT_SYSTEMS, small_talk.UNKNOWN]
    tables += [intent.questions for intent in small_talk.INTENTS]

    assert len(tables) > 40
    for table in tables:
        mine, other = chat_words.trained(table), chat_words.held_out(table)
        assert not set(mine) & set(other), "a wording is in the table twice"
        assert sorted((*mine, *other)) == sorted(table)
        assert other


def test_training_never_asks_an_evaluation_question(
    trained: list[Example], evaluated: list[Example]
) -> None:
    mine = {(e.messages[0].content, e.prompt.text) for e in trained if e.prompt}
    other = {(e.messages[0].content, e.prompt.text) for e in evaluated if e.prompt}

    assert not mine & other


def test_no_rewording_of_a_trained_question_is_a_held_out_one() -> None:
    held_out = {
        question.lower().rstrip("?")
        for intent in small_talk.INTENTS
        for question in chat_words.held_out(intent.questions)
    }
    drawn = source(5)
    asked = {talk(drawn, turns=1).messages[-1].content.lower().rstrip("?") for _ in range(3000)}

    assert len(asked) > 1000
    assert not asked & held_out


def test_training_and_evaluation_share_no_scene_and_no_unknown_word() -> None:
    mine, other = source(1), source(2, held_out=True)

    assert not any(scenes.held_out(mine.description(motion=i % 2 == 0)) for i in range(200))
    assert all(scenes.held_out(other.description(motion=i % 2 == 0)) for i in range(200))
    assert not {unknown_word(mine) for _ in range(500)} & {unknown_word(other) for _ in range(500)}


def test_there_are_hundreds_of_system_prompts_in_every_hundred_words() -> None:
    drawn = source(4)
    prompts = {system_prompt(drawn, "image", least=10)[0] for _ in range(400)}

    assert len(prompts) > 380


# --- chat ----------------------------------------------------------------------------------------


def test_every_answer_has_a_sign_of_its_own_intent_and_of_no_other() -> None:
    for intent in small_talk.INTENTS:
        for answer in intent.answers:
            for other in small_talk.INTENTS:
                chat = Example("chat", (), "", intent=other.name, signs=other.signs)
                right = answers_right(chat, answer)
                assert right == (other is intent), (other.name, answer)


def test_no_question_belongs_to_two_intents() -> None:
    asked = Counter(
        question.lower() for intent in small_talk.INTENTS for question in intent.questions
    )

    assert not [question for question, count in asked.items() if count > 1]


def test_conversations_alternate_between_user_and_assistant() -> None:
    for seed in range(300):
        drawn = source(seed)
        example = talk(drawn) if seed % 2 else enhancement(drawn, "image", long=True)
        roles = [message.role for message in example.messages if message.role != "system"]

        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


# --- the vocabulary ------------------------------------------------------------------------------


def test_every_word_of_a_prompt_is_one_token(tokenizer: Qwen2Tokenizer) -> None:
    in_pieces = [word for word in prompt_words() if len(tokenizer.encode(f" {word}")) != 1]

    assert len(prompt_words()) > 350
    assert in_pieces == []


def test_the_vocabulary_is_small_and_can_say_anything(tokenizer: Qwen2Tokenizer) -> None:
    text = "Ünïcode, 中文, emoji 🎈,\n\ttabs and  spaces; <|im_end|> typed by a user"
    ids = tokenizer.backend_tokenizer.encode("x" + text).ids

    assert 2000 <= len(tokenizer) <= 2500
    assert tokenizer.decode(ids) == "x" + text


def test_training_sees_the_ids_that_the_worker_makes(
    tokenizer: Qwen2Tokenizer, tmp_path: Path, trained: list[Example]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    served = ByteLevelTokenizer(tmp_path / "tokenizer.json", "demo-chat")
    encoder = Encoder(tokenizer)
    for example in trained[:200]:
        messages = [ChatMessage(role=m.role, content=m.content) for m in example.messages]
        pieces = find_template("chatml").render(messages)

        assert encoder.question(example) == served.encode(pieces), example


def test_the_template_of_the_files_is_the_template_of_the_worker(tokenizer: Qwen2Tokenizer) -> None:
    messages = [{"role": "system", "content": " a "}, {"role": "user", "content": "b\n"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = find_template("chatml").render([ChatMessage(**message) for message in messages])

    assert text == "".join(piece.text for piece in pieces)


# --- what training weighs ------------------------------------------------------------------------


def test_only_what_the_assistant_says_counts_in_the_loss(tokenizer: Qwen2Tokenizer) -> None:
    example = Example(
        "chat",
        (Message("user", "hi"), Message("assistant", "Hello!"), Message("user", "bye")),
        "Goodbye!",
    )
    encoded = Encoder(tokenizer).conversation(example)
    said = [one for one, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]

    assert tokenizer.decode(said) == f"Hello!{MESSAGE_END}Goodbye!{MESSAGE_END}"


def test_what_is_copied_and_where_an_answer_ends_weigh_more(tokenizer: Qwen2Tokenizer) -> None:
    prompt = Prompt("a red cube", ("red cube",), "thing")
    example = Example("image", (Message("user", "a red cube"),), "a red cube, vivid.", prompt)
    encoded = Encoder(tokenizer).conversation(example)

    assert [weight for weight in encoded.weights if weight] == [2, 2, 2, 3, 1, 3, 1]


def test_every_conversation_is_in_one_pass_and_padding_weighs_nothing(
    tokenizer: Qwen2Tokenizer, trained: list[Example]
) -> None:
    encoder = Encoder(tokenizer)
    batch = [encoder.conversation(example) for example in trained[:24]]
    made = list(passes(batch))

    assert sum(len(ids) for ids, _ in made) == 24
    assert sum(float(weights.sum()) for _, weights in made) == sum(sum(b.weights) for b in batch)
    assert all(ids.numel() <= 1024 for ids, _ in made if len(ids) > 1)


def test_a_copying_exercise_repeats_the_question_token_by_token(tokenizer: Qwen2Tokenizer) -> None:
    encoded = Encoder(tokenizer).random_copy(random.Random(1))
    answer = [one for one, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    question = encoded.ids[: -len(answer)]

    assert tokenizer.decode(answer).endswith(MESSAGE_END)
    start = question.index(encoded.ids[0], 1) if "system" in tokenizer.decode(question) else 0
    # After <|im_start|>, "user" and the newline.
    assert answer[:-1] == question[start + 3 : start + 3 + len(answer) - 1]


def test_an_untrained_network_already_looks_where_copying_must_look(
    tokenizer: Qwen2Tokenizer,
) -> None:
    model = new_network(tokenizer, seed=1).eval()
    model.set_attn_implementation("eager")
    chance = random.Random(1)
    once = [chance.randrange(VOCABULARY) for _ in range(30)]
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([once + once]), output_attentions=True).attentions
    to_the_one_before = layers[0][0].diagonal(-1, dim1=1, dim2=2).mean(1)
    to_what_followed = layers[1][0, :, 30:].diagonal(1, dim1=1, dim2=2).mean(1)

    # Heads 0 and 3 are prepared; the others are as random as usual.
    others = [1, 2, 4, 5]
    assert float(to_the_one_before[[0, 3]].min()) > 0.8
    assert float(to_what_followed[[0, 3]].min()) > 1.5 * float(to_what_followed[others].max())


@pytest.mark.parametrize(("shape", "size"), [((64, 192), 0.02), ((192, 64), 0.02 * 3**0.5)])
def test_an_update_moves_all_directions_alike(shape: tuple[int, int], size: float) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices, _ = make_optimizers(layer)

    set_learning_rate(matrices, 1.0)
    matrices.step()

    values = torch.linalg.svdvals((layer.weight.detach() - before) / size)
    assert 0.5 < float(values.min()) and float(values.max()) < 1.3


# --- what the checks notice ----------------------------------------------------------------------

RED = Prompt(
    "a red circle and two blue stars on a black background",
    ("red circle", "two blue stars"),
    "shape",
    scenes.Description((scenes.Thing("circle", "red"), scenes.Thing("star", "blue"))),
)
ASKED = Example("image", (Message("user", RED.text),), "", RED, budget=20)
GOOD = f"{RED.text}, soft light, 50mm lens."


def test_a_good_answer_passes() -> None:
    verdict = judge(ASKED, GOOD)

    assert is_right(verdict) and verdict.copies and not verdict.repeats


def test_an_opening_and_a_capital_are_fine() -> None:
    assert is_right(judge(ASKED, "A photograph of " + GOOD))
    assert is_right(judge(ASKED, GOOD[0].upper() + GOOD[1:]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("red circle", "green circle"),
        ("red circle", "red square"),
        ("two blue stars", "three blue stars"),
        ("two blue stars", "blue stars"),
        ("a red circle and ", ""),
        ("red circle and two blue", "blue circle and two red"),
        ("stars", "starships"),
    ],
)
def test_a_lost_thing_colour_or_number_is_noticed(old: str, new: str) -> None:
    assert not judge(ASKED, GOOD.replace(old, new)).keeps


@pytest.mark.parametrize(
    "extra",
    [
        "white background", "a green square", "three birds", "on the left", "large", "at night",
        "moving left", "close-up, wide angle", "35mm photograph", "walking",
    ],
)  # fmt: skip
def test_a_contradicting_addition_is_noticed(extra: str) -> None:
    answer = GOOD.replace("soft light", extra)

    assert judge(ASKED, answer).contradictions
    assert not judge(ASKED, GOOD).contradictions


def test_a_full_stop_that_ends_the_message_may_stay_and_is_no_addition() -> None:
    kept = GOOD.replace(f"{RED.text},", f"{RED.text}.,")
    instead = GOOD.replace(f"{RED.text},", f"{RED.text}.")

    assert kept != GOOD and instead != GOOD
    assert not judge(ASKED, kept).contradictions
    assert judge(ASKED, kept.replace("50mm lens", "a cat")).contradictions


def test_a_changed_background_is_noticed() -> None:
    assert judge(ASKED, GOOD.replace("black", "white")).contradictions


def test_an_answer_over_its_budget_is_noticed() -> None:
    assert judge(ASKED, GOOD).in_budget
    assert not judge(replace(ASKED, budget=14), GOOD).in_budget
    assert judge(replace(ASKED, budget=None), GOOD).in_budget is None


def test_a_detail_that_comes_twice_is_noticed() -> None:
    assert judge(ASKED, GOOD.replace("50mm lens", "50mm lens, soft light")).repeats


def test_the_style_is_told_by_the_words_that_were_added() -> None:
    assert style_of(["soft light", "50mm lens"]) == "image"
    assert style_of(["soft light", "slow tracking shot"]) == "video"
    assert style_of(["soft light"]) is None
    assert style_of(["50mm lens", "slow tracking shot"]) is None
    assert not judge(replace(ASKED, kind="video"), GOOD).style


def test_an_answer_that_did_not_end_is_not_right() -> None:
    assert not is_right(judge(ASKED, GOOD, ended=False))


def test_a_second_motion_and_a_turning_circle_are_noticed() -> None:
    moving = replace(RED, text="a red circle moving left", moves=True)
    circle = replace(
        RED,
        text="a red circle",
        description=scenes.Description((scenes.Thing("circle", "red"),)),
    )

    assert contradictions(moving, "video", ["moving up"])
    assert contradictions(circle, "video", ["spinning"])
    assert contradictions(circle, "video", ["moving up", "rising"])
    assert not contradictions(circle, "video", ["moving up", "long take"])


def test_daylight_at_night_is_noticed_unless_the_prompt_says_it() -> None:
    night = Prompt("an owl at night", ("owl",), "mover", night=True)
    said = replace(night, text="an owl at night, natural light", details=("natural light",))

    assert contradictions(night, "image", ["diffused daylight"])
    assert not contradictions(said, "image", ["sharp focus"])


def test_an_answer_to_another_question_is_not_right() -> None:
    intents = {intent.name: intent for intent in small_talk.INTENTS}
    chat = Example("chat", (), "", signs=intents["chat port"].signs)

    assert answers_right(chat, intents["chat port"].answers[0])
    assert not answers_right(chat, intents["media port"].answers[0])
    assert not answers_right(chat, small_talk.DO_NOT_KNOW[0])
