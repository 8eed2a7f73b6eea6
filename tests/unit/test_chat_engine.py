"""The chat engine on the demo model: batches, cache and pool sizes must not change a token."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.catalog import chat_catalog
from worker.config import REPOSITORY, load_settings
from worker.engine.chat.attention import PagedKV
from worker.engine.chat.engine import ChatEngine
from worker.engine.chat.model import LanguageModel
from worker.engine.chat.scheduler import Piece, TokenSequence
from worker.engine.host import Report, Ticket
from worker.engine.leases import Leases, alone
from worker.protocol.messages import (
    ChatMessage,
    Failed,
    Generate,
    Generated,
    LoadModel,
    Message,
    ModelChanged,
    Sampling,
    Token,
    Tokens,
    UnloadModel,
)
from worker.receipt import ids_sha256
from worker.vram.peak import Peak, Question
from worker.vram.sizes import Peaks

MODEL = "demo-chat"
SYSTEM = (
    "You are an expert prompt engineer for SDXL. Rewrite the user's prompt as a detailed "
    "photographic image prompt. Keep every object, colour and number. Answer with the prompt only. "
    "Do not change the subject. Do not add new objects. Mention camera, lens and lighting. Write "
    "one paragraph. Do not use quotation marks. Preserve the meaning of the original. Use commas "
    "between the details. Be vivid and concrete. Never contradict the user. Write in English."
)
SYSTEM_BLOCKS = 4  # at least, that all rows have in common
# Of demo-chat: 4 layers, 2 heads of 48, keys and values, 16 tokens, float32.
BLOCK_BYTES = 2 * 4 * 2 * 48 * 16 * 4
TOKENS = 8


class Outbox:
    """Keeps what an engine sends."""

    def __init__(self) -> None:
        self.sent: dict[str, list[Message]] = {}
        self.woken = threading.Event()

    def send(self, ticket: Ticket, message: Message) -> None:
        events = message.tokens if isinstance(message, Tokens) else (message,)
        for event in events:
            request_id = event.request_id if isinstance(event, Token) else ticket.request_id
            self.sent.setdefault(request_id, []).append(event)

    def publish(self, report: Report) -> None:
        pass

    def poll(self) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        pass

    def wake(self) -> None:
        self.woken.set()


class KnownPeaks(Peaks):
    """Every pass takes the same; what passes take is not this file's business."""

    def ask(self, questions: Sequence[Question]) -> list[Peak]:
        one = Peak(weight_bytes=1, parked_bytes=1, streamed_bytes=1, peak_bytes=1 << 20)
        return [one for _ in questions]


PEAKS = KnownPeaks(Path("nowhere"))


class Bench:
    """An engine, and requests to it by name."""

    def __init__(
        self,
        state_dir: Path,
        *,
        kv_blocks: int = 1024,
        max_running: int = 16,
        leases: Leases | None = None,
        **more: Any,
    ):
        settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(state_dir)})
        self.outbox = Outbox()
        self.now = 0.0
        self.engine = ChatEngine(
            chat_catalog(settings),
            [MODEL],
            torch.device("cpu"),
            state_dir,
            self.outbox,
            leases or alone(1 << 34, lambda: self.now),
            PEAKS,
            kv_bytes=kv_blocks * BLOCK_BYTES,
            max_running=max_running,
            compiles=False,
            **more,
            clock=lambda: self.now,
        )
        while not self.engine.step() and self.is_loading():
            pass  # loads the model

    @property
    def model(self) -> LanguageModel:
        return self.engine._models.ensure(MODEL)

    def ask(
        self, name: str, prompt: str, *, stream: bool = False, deterministic: bool = False,
        schema: Any = None, deadline_s: float = 60.0, model: str = MODEL, **sampling: Any,
    ) -> Ticket:  # fmt: skip
        ticket = Ticket(b"peer", name)
        self.engine.submit(
            ticket,
            Generate(
                request_id=name,
                model=model,
                messages=(ChatMessage("system", SYSTEM), ChatMessage("user", prompt)),
                sampling=Sampling(**{"max_tokens": TOKENS, "temperature": 0.0, **sampling}),
                stream=stream,
                deterministic=deterministic,
                schema=None if schema is None else json.dumps(schema),
                deadline_s=deadline_s,
            ),
        )
        return ticket

    def is_loading(self) -> bool:
        """Whether a model is on its way; waits for it."""
        if self.engine._models.coming is None:
            return False
        assert self.outbox.woken.wait(60)
        self.outbox.woken.clear()
        return True

    def send(self, message: LoadModel | UnloadModel) -> None:
        self.engine.submit(Ticket(b"peer", message.request_id), message)

    def run(self) -> dict[str, Message]:
        """Step until idle; the last message of each request."""
        while self.engine.step() or self.is_loading():
            pass
        return {name: messages[-1] for name, messages in self.outbox.sent.items()}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The model is too small for two, and sums over another number of threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def prompts(count: int) -> list[str]:
    """Of 1 to 60 words."""
    chance = random.Random(1)
    words = "a red blue green tiny cube star horse on the table at night with two boats".split()
    return [" ".join(chance.choices(words, k=chance.randint(1, 60))) for _ in range(count)]


PROMPTS = prompts(200)


@pytest.fixture(scope="module")
def expected(state_dir: Path) -> list[str]:
    """Hashes of what transformers' own generate continues each prompt with, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        REPOSITORY / "models" / MODEL, dtype=torch.float32
    ).eval()
    reader = Bench(state_dir).model.reader
    hashes = []
    for prompt in PROMPTS:
        messages = (ChatMessage("system", SYSTEM), ChatMessage("user", prompt))
        _, ids, _ = reader.read(messages, None)
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        completion = made[0, len(ids) :].tolist()
        if completion[-1] in reader.end_ids:
            completion.pop()
        hashes.append(ids_sha256(completion))
    return hashes


def hashes(results: dict[str, Message], count: int = len(PROMPTS)) -> list[str]:
    """Of the completions of requests 0, 1, …"""
    found = []
    for index in range(count):
        result = results[str(index)]
        assert isinstance(result, Generated), result
        found.append(result.receipt["completion_ids_sha256"])
    return found


def finished(result: Message) -> Generated:
    assert isinstance(result, Generated), result
    return result


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.timeout(900)  # half a minute on two free cores
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("at_once", "kernel"), [(1, True), (4, True), (16, True), (4, False), (16, False)]
)
def test_greedy_tokens_are_those_of_generate_with_a_cold_and_a_warm_cache(
    at_once: int,
    kernel: bool,
    state_dir: Path,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PagedKV, "has_kernel", lambda _: kernel)
    bench = Bench(state_dir, max_running=at_once)

    for cached in (False, True):
        for index, prompt in enumerate(PROMPTS):
            bench.ask(str(index), prompt)
        results = bench.run()

        assert hashes(results) == expected
        # The first one cannot have found anything, and each later one finds the system prompt.
        assert (finished(results["0"]).receipt["prompt_tokens_cached"] > 0) == cached
        assert finished(results["1"]).receipt["prompt_tokens_cached"] >= 16 * SYSTEM_BLOCKS


def test_greedy_tokens_are_those_of_generate_in_small_pieces(
    state_dir: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.chat.model.PASS_TOKENS", {"cpu": 7})
    bench = Bench(state_dir, max_running=5)
    for index, prompt in enumerate(PROMPTS[:60]):
        bench.ask(str(index), prompt)

    assert hashes(bench.run(), 60) == expected[:60]


def test_greedy_tokens_are_those_of_generate_when_sequences_are_parked(
    state_dir: Path, expected: list[str]
) -> None:
    bench = Bench(state_dir, kv_blocks=16)
    for index, prompt in enumerate(PROMPTS[:60]):
        bench.ask(str(index), prompt)
    most_parked = 0
    while bench.engine.step():
        most_parked = max(most_parked, bench.model.scheduler.parked)

    results = {name: messages[-1] for name, messages in bench.outbox.sent.items()}
    assert hashes(results, 60) == expected[:60]
    assert most_parked > 0


def test_greedy_tokens_are_those_of_generate_while_the_pool_shrinks_and_grows(
    state_dir: Path, expected: list[str]
) -> None:
    bench = Bench(state_dir, kv_blocks=400)
    for index, prompt in enumerate(PROMPTS[:60]):
        bench.ask(str(index), prompt)
    sizes = iter([40, 16, 16, 100, 17, 400, 30, 500])
    steps, parked = 0, 0
    while bench.engine.step():
        steps += 1
        if steps % 9 == 0:
            size = next(sizes, 100)
            bench.model.runner.resize(bench.model.scheduler, bench.model.pool, size)
            parked += bench.model.scheduler.parked

    results = {name: messages[-1] for name, messages in bench.outbox.sent.items()}
    assert hashes(results, 60) == expected[:60]
    assert parked > 0


def test_draws_do_not_depend_on_who_else_is_served(state_dir: Path) -> None:
    options = [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    ]
    alone, together = Bench(state_dir), Bench(state_dir)
    for index, prompt in enumerate(PROMPTS[:40]):
        alone.ask(str(index), prompt, seed=index, **options[index % 4])
        alone.run()
        together.ask(str(index), prompt, seed=index, **options[index % 4])

    assert hashes(together.run(), 40) == hashes(alone.run(), 40)


# --- the deterministic lane ----------------------------------------------------------------------

INTERLEAVINGS, EACH = 20, 50


def recorded(bench: Bench) -> dict[tuple[int, ...], bytes]:
    """Text of a deterministic sequence -> the bits of the logits after it; two may not differ."""
    seen: dict[tuple[int, ...], bytes] = {}
    run = bench.model.runner.run

    def recording(pieces: Sequence[Any]) -> list[torch.Tensor]:
        rows = run(pieces)
        sampled = [piece for piece in pieces if piece.samples]
        for piece, row in zip(sampled, rows, strict=True):
            if piece.sequence.deterministic:
                text = tuple(piece.sequence.ids)
                assert seen.setdefault(text, row.numpy().tobytes()) == row.numpy().tobytes()
        return rows

    bench.model.runner.run = recording  # type: ignore[method-assign]
    return seen


@pytest.mark.timeout(900)  # half a minute on two free cores
def test_the_deterministic_lane_gives_the_same_bits_in_every_interleaving(state_dir: Path) -> None:
    asked = PROMPTS[:EACH]
    options = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0}]
    alone = Bench(state_dir)
    bits = recorded(alone)
    for index, prompt in enumerate(asked):
        alone.model.pool.drop_cached()
        alone.ask(str(index), prompt, deterministic=True, max_tokens=4, **options[index % 2])
        expected = alone.run()

    different = 0
    for number in range(INTERLEAVINGS):
        chance = random.Random(number)
        bench = Bench(state_dir, kv_blocks=chance.choice((30, 60, 400)))
        others = recorded(bench)
        waiting = [*range(EACH), *[-1] * 20]
        chance.shuffle(waiting)
        while waiting or bench.engine.step():
            for _ in range(chance.randint(0, 8)):
                if waiting and (index := waiting.pop()) >= 0:
                    bench.ask(
                        str(index), asked[index], deterministic=True, max_tokens=4,
                        **options[index % 2],
                    )  # fmt: skip
                elif waiting:  # one of the other lane in between
                    bench.ask(f"other {len(waiting)}", chance.choice(PROMPTS), max_tokens=4)
            bench.engine.step()
            if chance.random() < 0.02:
                bench.model.pool.drop_cached()
        results = {name: messages[-1] for name, messages in bench.outbox.sent.items()}
        different += hashes(results, EACH) != hashes(expected, EACH)
        assert others == bits

    assert different == 0
    result = finished(results["0"])
    assert result.receipt["exactness"] == "bit"


def test_greedy_tokens_of_the_deterministic_lane_are_those_of_generate(
    state_dir: Path, expected: list[str]
) -> None:
    bench = Bench(state_dir)
    for index, prompt in enumerate(PROMPTS[:60]):
        bench.ask(str(index), prompt, deterministic=True)

    assert hashes(bench.run(), 60) == expected[:60]


# --- structured output ---------------------------------------------------------------------------

SCENE = {
    "type": "object",
    "properties": {
        "subject": {"type": "string", "maxLength": 12},
        "colour": {"enum": ["red", "blue", "green"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["soft", "warm"]}, "maxItems": 3},
    },
    "required": ["subject", "colour", "count", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_answer_follows_its_schema_and_others_are_as_before(
    state_dir: Path, expected: list[str], deterministic: bool
) -> None:
    bench = Bench(state_dir)
    for index, prompt in enumerate(PROMPTS[:16]):
        bench.ask(str(index), prompt)
        bench.ask(
            f"json {index}", prompt, schema=SCENE, seed=index, temperature=1.2, top_p=1.0,
            max_tokens=400, deterministic=deterministic,
        )  # fmt: skip

    results = bench.run()

    assert hashes(results, 16) == expected[:16]
    for index in range(16):
        result = finished(results[f"json {index}"])
        assert result.finish_reason == "stop"
        scene = json.loads(result.text)
        assert list(scene) == ["subject", "colour", "count", "tags"]
        assert len(scene["subject"]) <= 12
        assert scene["colour"] in ("red", "blue", "green")
        assert 1 <= scene["count"] <= 99
        assert set(scene["tags"]) <= {"soft", "warm"}
        assert len(scene["tags"]) <= 3


def test_any_object_is_json(state_dir: Path) -> None:
    bench = Bench(state_dir)
    bench.ask("one", "a cat", schema={"type": "object"}, max_tokens=400, seed=4, temperature=0.9)

    result = finished(bench.run()["one"])

    if result.finish_reason == "stop":
        assert isinstance(json.loads(result.text), dict)
    else:
        assert result.text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema",
    [{"type": "strange"}, {"unevaluatedProperties": False}, {"$ref": "#"}, {"minimum": math.inf}],
)
def test_a_schema_that_cannot_be_enforced_is_refused_and_others_go_on(
    state_dir: Path, schema: dict[str, Any], expected: list[str]
) -> None:
    bench = Bench(state_dir)
    bench.ask("0", PROMPTS[0])
    bench.ask("bad", PROMPTS[1], schema=schema)

    results = bench.run()

    failure = results["bad"]
    assert isinstance(failure, Failed)
    assert (failure.status, failure.code) == (422, "unsupported")
    assert hashes(results, 1) == expected[:1]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_grammar_that_gives_up_ends_its_own_request_and_moves_no_other(
    state_dir: Path, deterministic: bool
) -> None:
    """The rows before it had remembered their tokens, and drew them again."""
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(520)}}
    options = {"temperature": 1.2, "top_p": 1.0, "max_tokens": 60, "deterministic": deterministic}
    alone, together = Bench(state_dir), Bench(state_dir)
    for index in range(4):
        alone.ask(str(index), PROMPTS[index], schema=SCENE, seed=index, **options)
        alone.run()
        together.ask(str(index), PROMPTS[index], schema=SCENE, seed=index, **options)
    together.ask("wide", PROMPTS[5], schema=wide, **options)
    expected = alone.run()

    results = together.run()

    failure = results.pop("wide")
    assert isinstance(failure, Failed)
    assert failure.code == "unsupported"
    assert hashes(results, 4) == hashes(expected, 4)
    counters = together.engine.report().counters
    assert counters is not None and counters["passes_retried"] == 0


def sequence_of(bench: Bench, name: str) -> TokenSequence:
    request = bench.engine._turns.of_ticket(Ticket(b"peer", name))
    assert request is not None
    return request.sequence


# --- numbers that are none -----------------------------------------------------------------------


def test_a_nan_ends_its_request_and_reaches_no_other(state_dir: Path, expected: list[str]) -> None:
    bench = Bench(state_dir, kv_blocks=60)
    for index in range(6):
        bench.ask(str(index), PROMPTS[index])
    while bench.engine.report().active < 6:
        bench.engine.step()
    broken = sequence_of(bench, "2")
    with torch.inference_mode():
        for layer in bench.model.runner._kv.values:
            layer[:, broken.blocks[-1]] = math.nan
    for index in range(6, 30):  # these take its blocks, again and again
        bench.ask(str(index), PROMPTS[index])

    results = bench.run()

    failure = results.pop("2")
    assert isinstance(failure, Failed)
    assert "no numbers" in failure.error
    done = {name: finished(one).receipt["completion_ids_sha256"] for name, one in results.items()}
    assert done == {str(n): expected[n] for n in range(30) if n != 2}


def test_a_prompt_whose_values_are_no_numbers_is_not_cached(state_dir: Path) -> None:
    bench = Bench(state_dir)
    run = bench.model.runner.run
    bench.model.runner.run = lambda pieces: [row * math.nan for row in run(pieces)]  # type: ignore[method-assign]
    bench.ask("bad", PROMPTS[0])
    assert isinstance(bench.run()["bad"], Failed)

    bench.model.runner.run = run  # type: ignore[method-assign]
    bench.ask("good", PROMPTS[0])

    assert finished(bench.run()["good"]).receipt["prompt_tokens_cached"] == 0


# --- requests ------------------------------------------------------------------------------------


def test_streamed_texts_are_together_the_text_and_others_get_none(state_dir: Path) -> None:
    bench = Bench(state_dir)
    bench.ask("plain", PROMPTS[0], max_tokens=40)
    bench.ask("streamed", PROMPTS[0], max_tokens=40, stream=True)
    bench.run()

    [plain], (*tokens, last) = bench.outbox.sent["plain"], bench.outbox.sent["streamed"]
    assert all(isinstance(one, Token) for one in tokens)
    text = "".join(one.text for one in tokens if isinstance(one, Token))
    assert text == finished(plain).text == finished(last).text
    assert len(tokens) > 5


def test_a_cancelled_request_is_gone_before_the_next_step(state_dir: Path) -> None:
    bench = Bench(state_dir, max_running=1)
    running = bench.ask("running", PROMPTS[0], max_tokens=500)
    waiting = bench.ask("waiting", PROMPTS[1])
    for _ in range(3):
        bench.engine.step()

    bench.engine.cancel(waiting)
    bench.engine.cancel(running)

    assert bench.model.pool.used == 0
    for name in ("running", "waiting"):
        failure = bench.outbox.sent[name][-1]
        assert isinstance(failure, Failed)
        assert failure.code == "cancelled"
    assert not bench.engine.step()


def test_a_deadline_ends_a_request_and_no_other(state_dir: Path) -> None:
    bench = Bench(state_dir)
    bench.ask("late", PROMPTS[0], deadline_s=5, max_tokens=500)
    bench.ask("fine", PROMPTS[1], deadline_s=50)
    bench.engine.step()

    bench.now = 6.0
    results = bench.run()

    assert isinstance(results["late"], Failed)
    assert results["late"].code == "deadline_exceeded"
    assert finished(results["fine"]).completion_tokens == TOKENS


def test_a_pass_that_fails_is_repeated_piece_by_piece_and_one_that_fails_alone_fails_alone(
    state_dir: Path, expected: list[str]
) -> None:
    bench = Bench(state_dir)
    for index, prompt in enumerate(PROMPTS[:8]):
        bench.ask(str(index), prompt)
    while not bench.engine.report().active == 8:
        bench.engine.step()
    run = bench.model.runner.run
    broken = sequence_of(bench, "3")
    calls: list[int] = []

    def failing(pieces: Sequence[Any]) -> list[torch.Tensor]:
        calls.append(len(pieces))
        if any(piece.sequence is broken for piece in pieces):
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return run(pieces)

    bench.model.runner.run = failing  # type: ignore[method-assign]
    results = bench.run()

    assert isinstance(results["3"], Failed)
    assert results["3"].code == "out_of_device_memory"
    others = [index for index in range(8) if index != 3]
    assert [finished(results[str(index)]).receipt["completion_ids_sha256"] for index in others] == [
        expected[index] for index in others
    ]
    assert calls[: calls[0] + 1] == [calls[0]] + [1] * calls[0]
    counters = bench.engine.report().counters
    assert counters is not None
    assert counters["passes_retried"] == 1


def test_a_model_is_unloaded_after_what_came_before_and_loaded_for_what_comes_after(
    state_dir: Path,
) -> None:
    bench = Bench(state_dir)
    bench.ask("before", PROMPTS[0])
    bench.engine.step()
    bench.send(UnloadModel(request_id="unload", model=MODEL))
    bench.ask("after", PROMPTS[0])
    results = bench.run()

    assert list(bench.outbox.sent) == ["before", "unload", "after"]
    assert isinstance(results["unload"], ModelChanged)
    assert results["unload"].changed
    assert finished(results["after"]).text == finished(results["before"]).text
    assert finished(results["after"]).receipt["prompt_tokens_cached"] == 0


def test_a_prompt_longer_than_the_pool_is_refused_with_both_counts(state_dir: Path) -> None:
    bench = Bench(state_dir, kv_blocks=3)
    bench.ask("long", PROMPTS[0])

    failure = bench.run()["long"]

    assert isinstance(failure, Failed)
    assert failure.code == "context_overflow"
    assert "holds 48" in failure.error


def test_what_is_asked_ends_where_the_pool_ends(state_dir: Path) -> None:
    bench = Bench(state_dir, kv_blocks=8)
    bench.ask("one", "a cat", max_tokens=500)

    result = finished(bench.run()["one"])

    assert result.finish_reason == "length"
    assert result.prompt_tokens + result.completion_tokens == 8 * 16


def test_reports_count_running_and_waiting(state_dir: Path) -> None:
    bench = Bench(state_dir, max_running=2)
    for index in range(5):
        bench.ask(str(index), PROMPTS[index])
    bench.engine.step()

    report = bench.engine.report()

    assert (report.active, report.waiting) == (2, 3) or (report.active, report.waiting) == (1, 4)
    bench.run()
    assert (bench.engine.report().active, bench.engine.report().waiting) == (0, 0)


def test_reports_have_what_an_operator_tunes_by(state_dir: Path) -> None:
    bench = Bench(state_dir)
    for name in ("first", "again"):
        bench.ask(name, PROMPTS[0])
        results = bench.run()

    first, again = finished(results["first"]), finished(results["again"])
    report = bench.engine.report()
    assert report.counters is not None and report.gauges is not None
    counters, gauges = report.counters, report.gauges
    cached = again.receipt["prompt_tokens_cached"]
    assert cached > 0
    assert counters["prompt_tokens"] == 2 * first.prompt_tokens
    assert counters["prompt_tokens_cached"] == cached
    # The last token of each is drawn and never computed.
    drawn = first.completion_tokens + again.completion_tokens
    assert counters["tokens_generated"] == drawn
    assert counters["tokens_computed"] == 2 * first.prompt_tokens - cached + drawn - 2
    assert counters["sequences_in_passes"] == counters["passes"] >= drawn
    assert gauges["kv_blocks"] == 1024
    assert gauges["kv_blocks_used"] == 0
    assert gauges["kv_blocks_cached"] > 0
    assert gauges["sequences_parked"] == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pinned_system_prompt_is_known_to_the_first_request_and_outlives_others(
    state_dir: Path, deterministic: bool
) -> None:
    blocks = 60
    bench = Bench(state_dir, kv_blocks=blocks, pinned=[SYSTEM], pinned_deterministic=deterministic)
    unpinned = Bench(state_dir, kv_blocks=blocks)
    for number in range(6):  # each fills half the pool with what nobody shares
        for one in (bench, unpinned):
            one.engine.submit(
                Ticket(b"peer", f"other {number}"),
                Generate(
                    request_id=f"other {number}",
                    model=MODEL,
                    prompt=" ".join(f"{number} {word}" for word in PROMPTS[:12]),
                    sampling=Sampling(max_tokens=4, temperature=0.0),
                    stream=False,
                    deterministic=False,
                    deadline_s=60.0,
                ),
            )
            one.run()
    for one in (bench, unpinned):
        one.ask("first", PROMPTS[0], deterministic=deterministic)
        one.run()

    found, cold = (finished(one.outbox.sent["first"][-1]).receipt for one in (bench, unpinned))
    beginning = len(bench.model.reader.beginning(SYSTEM))
    block = 64 if deterministic else 16
    assert found["prompt_tokens_cached"] == beginning // block * block > 0
    assert cold["prompt_tokens_cached"] == 0
    assert found["completion_ids_sha256"] == cold["completion_ids_sha256"]


def test_a_pinned_system_prompt_longer_than_the_pool_is_refused_with_both_counts(
    state_dir: Path,
) -> None:
    bench = Bench(state_dir, kv_blocks=4, pinned=["word " * 200])

    [state] = [one for one in bench.engine.report().models if one.id == MODEL]
    assert state.status == "broken"
    assert re.search(r"number 1 has \d{3,} tokens, and there is room for 64", state.problem or "")


def test_ends_and_beginnings_are_foretold(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refused client is told: within a fifth of what happens."""
    bench = Bench(state_dir, max_running=1)
    compute = bench.model.runner.run

    def slowly(pieces: Sequence[Piece]) -> list[torch.Tensor]:
        bench.now += 0.5
        return compute(pieces)

    monkeypatch.setattr(bench.model.runner, "run", slowly)
    for name, tokens in (("first", 30), ("second", 20)):
        bench.ask(name, PROMPTS[3], max_tokens=tokens)
    for _ in range(4):
        bench.engine.step()
    began, gauges = bench.now, bench.engine.report().gauges
    assert gauges is not None
    ended: dict[str, float] = {}
    while bench.engine.step():
        for name, sent in bench.outbox.sent.items():
            if isinstance(sent[-1], Generated):
                assert sent[-1].finish_reason == "length"
                ended.setdefault(name, bench.now - began)

    assert gauges["first_end_ms"] / 1000 == pytest.approx(ended["first"], rel=0.2)
    assert gauges["begin_ms"] / 1000 == pytest.approx(ended["second"], rel=0.2)
    bench.now += 1
    idle = bench.engine.report().gauges
    assert idle is not None
    assert (idle["first_end_ms"], idle["begin_ms"]) == (0, 0)


def test_every_step_of_a_busy_engine_says_that_there_is_more(state_dir: Path) -> None:
    bench = Bench(state_dir)
    stepping: Callable[[], bool] = bench.engine.step
    assert not stepping()
    bench.ask("one", PROMPTS[0])
    assert stepping()


def test_waiting_begins_when_the_process_has_the_message_not_when_the_engine_takes_it(
    state_dir: Path,
) -> None:
    bench = Bench(state_dir)
    bench.now = 10.0
    ticket = Ticket(b"peer", "1", received=9.25)
    message = Generate(
        request_id="1", model=MODEL, messages=(ChatMessage("user", "a"),),
        sampling=Sampling(max_tokens=1, temperature=0.0), stream=False, deadline_s=60.0,
    )  # fmt: skip
    bench.engine.submit(ticket, message)
    answer = bench.run()["1"]
    assert isinstance(answer, Generated)
    assert answer.queue_s == 0.75
