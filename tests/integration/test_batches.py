"""Jobs that share a batch: each has its own pictures, steps, errors and end, and the pictures are
those of its job alone, but for what rounding makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.integration.test_residency import MIB, Bench, hashes, steps
from worker.engine.host import Ticket
from worker.engine.leases import Leases, Question, alone
from worker.engine.media import engine as engine_module
from worker.protocol.messages import Failed, JobRendered, Message, Progress, RenderJob, RenderParams
from worker.vram.ways import SPLITS

ROOMY = 1 << 34
PARAMS = RenderParams(
    prompt="a red circle", negative_prompt="a square", width=64, height=64, steps=4,
    guidance_scale=5.0, seed=5,
)  # fmt: skip
OTHER = {"prompt": "a blue square", "negative_prompt": None, "seed": 40}
# Of 255, in a channel of a pixel: a value that lies between two may go to either.
MOST_APART = 1


class Batches(Bench):
    """A media engine, and what it said of each job."""

    def __init__(self, state_dir: Path, leases: Leases):
        super().__init__(state_dir, leases)
        self.between: Callable[[int], None] = lambda step: None
        self.steps_seen = 0
        self.outbox.poll = self._poll  # type: ignore[method-assign]
        self._round = 0

    def _poll(self) -> None:
        self.steps_seen += 1
        self.between(self.steps_seen)

    def ticket(self, name: str) -> Ticket:
        return Ticket(b"peer", f"{name}{self._round}")  # type: ignore[arg-type]

    def together(self, jobs: dict[str, RenderParams], **more: Any) -> dict[str, Message]:
        """The ends of jobs that are sent to share the first one's batch. more: `exactness` by name,
        of jobs that do not say close."""
        self._round += 1
        self.steps_seen = 0
        names = [self.ticket(name).request_id for name in jobs]
        for name, params in jobs.items():
            ticket = self.ticket(name)
            job = RenderJob(
                request_id=ticket.request_id, model="demo-image", output="image", params=params,
                staging_dir=str(self.state_dir / ticket.request_id),
                exactness=more.get(name, "close"),
                companions=tuple(names[1:]) if ticket.request_id == names[0] else (),
            )  # fmt: skip
            self.engine.submit(ticket, job)
        while self.engine.step():
            pass
        ends = {
            one.request_id: one for one in self.outbox.sent if isinstance(one, JobRendered | Failed)
        }
        return {name: ends[self.ticket(name).request_id] for name in jobs}

    def done_together(self, jobs: dict[str, RenderParams], **more: Any) -> dict[str, JobRendered]:
        ends = self.together(jobs, **more)
        assert all(isinstance(one, JobRendered) for one in ends.values()), ends
        return ends  # type: ignore[return-value]

    def pictures(self, done: JobRendered) -> list[npt.NDArray[np.int16]]:
        folder = self.state_dir / done.request_id
        return [np.asarray(Image.open(folder / one.file)).astype(np.int16) for one in done.assets]

    def told(self, name: str, phase: str = "denoise") -> list[int]:
        """Steps of a job in the last round."""
        return [
            one.step for one in self.outbox.sent
            if isinstance(one, Progress) and one.phase == phase
            and one.request_id == self.ticket(name).request_id
        ]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small models slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return Batches(tmp_path_factory.mktemp("batches"), alone(ROOMY))


@pytest.fixture
def bench(engine: Batches) -> Batches:
    engine.outbox.sent.clear()
    engine.outbox.waits = 0
    engine.between = lambda step: None
    return engine


def changed(**changes: Any) -> RenderParams:
    return msgspec.structs.replace(PARAMS, **changes)


def shared(done: JobRendered) -> dict[str, int] | None:
    batch: dict[str, int] | None = done.receipt.get("batch")
    return batch


def assert_alike(bench: Batches, done: JobRendered, lone: JobRendered) -> None:
    for one, other in zip(bench.pictures(done), bench.pictures(lone), strict=True):
        apart = np.abs(one - other)
        assert apart.max() <= MOST_APART
        assert (apart > 0).mean() < 0.001


@pytest.mark.parametrize("scheduler", [None, "euler", "euler_a", "dpm++", "unipc", "ddim"])
def test_jobs_of_a_batch_get_the_pictures_of_their_jobs_alone(
    scheduler: str | None, bench: Batches
) -> None:
    jobs = {
        "a": changed(scheduler=scheduler),
        "b": changed(scheduler=scheduler, num_images=2, **OTHER),
        "c": changed(scheduler=scheduler, seed=77, prompt=""),
    }

    done = bench.done_together(jobs)
    steps = bench.steps_seen

    for name, params in jobs.items():
        lone = bench.done("demo-image", f"alone-{scheduler}-{name}", params=params)
        assert_alike(bench, done[name], lone)
        assert shared(done[name]) == {"jobs": 3, "images": 4}
        assert (done[name].receipt["exactness"], lone.receipt["exactness"]) == ("close", "bit")
        assert shared(lone) is None
        for fact in ("seeds", "scheduler_class", "parameters", "prompt_tokens", "components"):
            assert done[name].receipt[fact] == lone.receipt[fact]
    assert steps == 4  # for all of them


def test_each_of_two_jobs_hears_of_its_own_steps_and_pictures(
    bench: Batches, every_step_is_told: None
) -> None:
    done = bench.done_together({"a": PARAMS, "b": changed(num_images=3, **OTHER)})

    assert [*dict.fromkeys(bench.told("a"))] == [0, 1, 2, 3, 4]
    assert [*dict.fromkeys(bench.told("b"))] == [0, 3, 6, 9, 12]
    assert shared(done["a"]) == shared(done["b"]) == {"jobs": 2, "images": 4}
    last = {
        name: [
            one.preview for one in bench.outbox.sent
            if isinstance(one, Progress) and one.preview
            and one.request_id == bench.ticket(name).request_id
        ][-1]
        for name in ("a", "b")
    }  # fmt: skip
    assert last["a"] != last["b"]


def test_a_job_that_does_not_allow_it_is_made_alone_with_every_bit(bench: Batches) -> None:
    lone = bench.done("demo-image", "alone-bit", params=PARAMS)

    done = bench.done_together({"a": changed(**OTHER), "b": PARAMS, "c": changed(seed=3)}, b="bit")
    led = bench.done_together({"a": PARAMS, "b": changed(seed=3)}, a="bit")

    assert [shared(done[name]) is not None for name in "abc"] == [True, False, True]
    assert hashes(done["b"]) == hashes(led["a"]) == hashes(lone)
    assert (done["b"].receipt["exactness"], shared(led["b"])) == ("bit", None)


def test_jobs_of_other_shapes_or_with_longer_texts_are_made_alone(bench: Batches) -> None:
    long = changed(prompt="a red circle and a blue square " * 15)
    jobs = {"a": PARAMS, "b": long, "c": changed(height=72), "d": changed(seed=8)}

    done = bench.done_together(jobs)

    assert {name: shared(one) is not None for name, one in done.items()} == {
        "a": True, "b": False, "c": False, "d": True,
    }  # fmt: skip
    assert done["b"].receipt["exactness"] == "bit"
    assert hashes(done["b"]) == hashes(bench.done("demo-image", "alone-long", params=long))


@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++", "unipc"])
def test_a_job_that_is_cancelled_leaves_and_the_others_go_on_without_its_work(
    scheduler: str, bench: Batches
) -> None:
    jobs = {
        "a": changed(scheduler=scheduler),
        "b": changed(scheduler=scheduler, num_images=2, **OTHER),
        "c": changed(scheduler=scheduler, seed=77),
    }
    told: list[int] = []

    def cancel(step: int) -> None:
        if step == 2:
            bench.engine.cancel(bench.ticket("b"))
            told.append(len(bench.outbox.sent))

    bench.between = cancel
    rows: list[int] = []

    def watch(_: Any, args: Any) -> None:
        rows.append(len(args[0]))

    bench.engine._models.ensure("demo-image")
    unet = bench.engine._models.get("demo-image")._pipeline.unet
    hook = unet.register_forward_pre_hook(watch)
    try:
        ends = bench.together(jobs)
    finally:
        hook.remove()

    gone = ends["b"]
    assert isinstance(gone, Failed)
    assert (gone.code, gone.error) == ("cancelled", "the job was cancelled after step 4 of 8")
    assert bench.outbox.sent[told[0]] is gone  # at once
    computed = [one for one in rows if one]
    # Both texts of each picture; the two skipped steps of the smaller batch compute nothing.
    assert computed[:2] == [8, 8]
    assert set(computed[2:]) == {4}
    bench.between = lambda step: None
    for name in "ac":
        done = ends[name]
        assert isinstance(done, JobRendered)
        lone = bench.done("demo-image", f"left-{scheduler}-{name}", params=jobs[name])
        assert_alike(bench, done, lone)
        assert shared(done) == {"jobs": 3, "images": 4}


def test_a_batch_whose_jobs_are_all_cancelled_computes_nothing_more(bench: Batches) -> None:
    def cancel(step: int) -> None:
        if step == 1:
            for name in "ab":
                bench.engine.cancel(bench.ticket(name))

    bench.between = cancel

    ends = bench.together({"a": PARAMS, "b": changed(**OTHER)})

    assert [one.code for one in ends.values() if isinstance(one, Failed)] == ["cancelled"] * 2
    assert bench.steps_seen == 1


def test_a_job_that_cannot_be_made_fails_alone(bench: Batches) -> None:
    jobs = {"a": changed(prompt="circle " * 1600), "b": PARAMS, "c": changed(**OTHER)}

    ends = bench.together(jobs)

    bad, good, other = ends.values()
    assert isinstance(bad, Failed)
    assert bad.code == "prompt_too_long"
    assert isinstance(good, JobRendered)
    assert isinstance(other, JobRendered)
    assert shared(good) == shared(other) == {"jobs": 2, "images": 2}


def test_a_picture_that_cannot_be_decoded_fails_its_job_alone(
    bench: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.done("demo-image", "first-of-all", params=PARAMS)
    model = bench.engine._models.get("demo-image")
    decode, tries = model.decode, []

    def damaged(latents: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("injected")
        return decode(latents)

    monkeypatch.setattr(model, "decode", damaged)
    ends = bench.together({"a": PARAMS, "b": changed(**OTHER)})

    assert isinstance(ends["a"], Failed)
    assert isinstance(ends["b"], JobRendered)
    assert shared(ends["b"]) == {"jobs": 2, "images": 2}


def test_what_fails_for_a_whole_batch_is_tried_for_each_alone_and_counted(
    bench: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = bench.done("demo-image", "alone-again", params=PARAMS)
    model = bench.engine._models.get("demo-image")
    denoise = model.denoise

    def fails_on_bad(params: RenderParams, texts: Any, *more: Any, **named: Any) -> Any:
        if len(texts["prompt_embeds"]) > 1 or params.prompt == OTHER["prompt"]:
            raise RuntimeError("injected")
        return denoise(params, texts, *more, **named)

    monkeypatch.setattr(model, "denoise", fails_on_bad)
    ends = bench.together({"a": PARAMS, "b": changed(**OTHER)})

    assert isinstance(ends["a"], JobRendered)
    assert hashes(ends["a"]) == hashes(lone)
    assert shared(ends["a"]) is None
    assert isinstance(ends["b"], Failed)
    assert bench.engine.report().counters["batches_given_up"] == 1  # type: ignore[index]


def test_jobs_that_do_not_fit_together_are_made_one_by_one_as_if_alone(tmp_path: Path) -> None:
    """By the plan a picture takes 11 MiB, and three of them 14 in the smallest way."""
    jobs = {
        name: changed(seed=seed, width=256, height=256, steps=1)
        for name, seed in (("a", 1), ("b", 2), ("c", 3))
    }
    tight = Batches(tmp_path, alone(12 * MIB))

    done = tight.done_together(jobs)

    for name, params in jobs.items():
        lone = tight.done("demo-image", f"lone-{name}", params=params, exactness="close")
        assert shared(done[name]) is None
        exactness = {one["phase"]: one["exactness"] for one in done[name].receipt["plan"]}
        assert exactness["denoise"] == "bit"
        assert hashes(done[name]) == hashes(lone)


def test_a_batch_with_too_little_room_for_its_denoiser_is_streamed(tmp_path: Path) -> None:
    params = {"width": 256, "height": 256, "steps": 1}
    tight = Batches(tmp_path, alone(24 * MIB))

    done = tight.done_together({name: changed(seed=ord(name), **params) for name in "abc"})

    for one in done.values():
        assert {"phase": "denoise", "way": "streamed", "exactness": "close"} in one.receipt["plan"]
        assert shared(one) == {"jobs": 3, "images": 3}


def test_a_batch_that_does_not_fit_at_once_is_computed_in_halves(tmp_path: Path) -> None:
    """Three pictures take 22 MiB streamed, and 19 or 14 in halves of one text of each of them."""
    jobs = {
        name: changed(seed=ord(name), width=256, height=256, steps=2, prompt=f"a {colour} circle")
        for name, colour in (("a", "red"), ("b", "blue"), ("c", "green"))
    }
    whole, roomy = with_outputs(Batches(tmp_path / "roomy", alone(ROOMY)), jobs)
    halves, done = with_outputs(Batches(tmp_path / "tight", alone(20 * MIB)), jobs)

    assert [len(one) for one in whole] == [6, 6]
    assert [len(one) for one in halves] == [3] * 4
    for step in range(2):
        both = torch.cat(halves[2 * step : 2 * step + 2])
        torch.testing.assert_close(both, whole[step], rtol=1e-3, atol=1e-3)
    for name, one in done.items():
        assert steps(one)["denoise"] in SPLITS
        assert steps(roomy[name])["denoise"] == "whole"
        assert shared(one) == {"jobs": 3, "images": 3}
        assert one.receipt["exactness"] == "close"


def with_outputs(bench: Batches, jobs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What the denoiser gave in each of its computations, and the jobs."""
    made: list[torch.Tensor] = []
    bench.engine._models.ensure("demo-image")
    last = bench.engine._models.get("demo-image")._pipeline.unet.conv_out
    hook = last.register_forward_hook(lambda *seen: made.append(seen[-1].float().clone()))
    done = bench.done_together(jobs)
    hook.remove()
    return made, done


@pytest.mark.parametrize(
    ("strictest", "way"), [("close", "streamed+split"), ("lossy", "quantised")]
)
def test_a_batch_is_quantised_only_where_all_of_its_jobs_allow_it(
    strictest: str, way: str, bench: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    offered: set[str] = set()
    enough = {"close": ["streamed+split"], "lossy": ["quantised"]}[strictest]
    bench.done("demo-image", "first-of-all", params=PARAMS)
    model = bench.engine._models.get("demo-image")
    ready = model.parts.ready

    @contextmanager
    def short_of_memory(lease: Question, names: Any) -> Iterator[None]:
        with ready(lease, names):
            if lease.asked.phase == "denoise":
                tried.append(lease.way.name)
                offered.update(way.name for way in lease.asked.ways)
                if lease.way.name not in enough:
                    raise torch.OutOfMemoryError("injected")
            yield

    monkeypatch.setattr(model.parts, "ready", short_of_memory)
    done = bench.done_together(
        {"a": PARAMS, "b": changed(**OTHER), "c": changed(seed=3)}, a="lossy", b=strictest,
        c="lossy",
    )  # fmt: skip

    assert tried[-1] == way
    assert ("quantised" in offered) == (strictest == "lossy")
    for one in done.values():
        assert shared(one) == {"jobs": 3, "images": 3}
        assert one.receipt["exactness"] == strictest


def test_a_batch_that_was_paused_goes_on_with_the_same_bytes(
    bench: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {
        "a": changed(scheduler="euler_a"),
        "b": changed(scheduler="euler_a", num_images=2, **OTHER),
    }
    whole = bench.done_together(jobs)
    leases: list[Question] = []
    also = bench.leases.also

    def watched(question: Question, request_id: str) -> None:
        leases.append(question)
        also(question, request_id)

    def pause(step: int) -> None:
        if step == 2:
            leases[-1].wanted_back = True

    monkeypatch.setattr(Leases, "also", lambda self, *given: watched(*given))
    bench.between = pause

    done = bench.done_together(jobs)

    assert [hashes(one) for one in done.values()] == [hashes(one) for one in whole.values()]
    assert [one.receipt["paused"] for one in done.values()] == [1, 1]
    assert len(leases) == 2


def test_a_job_does_not_wait_for_ever_for_one_that_never_comes(
    bench: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "JOIN_S", 0.05)

    done = bench.done("demo-image", "left", params=PARAMS, exactness="close", companions=("x",))

    assert shared(done) is None
