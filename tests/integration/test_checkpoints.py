"""A denoising that was interrupted ends with the bytes of one that was not: after a crash, after a
pause, at every step, with every scheduler. What it cannot go on from safely it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from tests.integration.test_residency import MIB, Bench, hashes
from tests.rendering import load
from worker.catalog import media_catalog
from worker.config import Kind, load_settings
from worker.engine.host import Ticket
from worker.engine.leases import Question, alone
from worker.engine.media import checkpoints
from worker.engine.media.checkpoints import Checkpoint, due, from_bytes, to_bytes
from worker.engine.media.course import CheckpointRefused, Course, Snapshot
from worker.engine.media.embeddings import EmbeddingCache
from worker.protocol.messages import (
    Failed,
    JobRendered,
    Message,
    Progress,
    Reference,
    RenderParams,
    Way,
)

IMAGE = RenderParams(
    prompt="a red circle", negative_prompt="a square", width=64, height=64, steps=6,
    guidance_scale=5.0, seed=5,
)  # fmt: skip
VIDEO = RenderParams(
    prompt="a red circle moves left", negative_prompt=None, width=64, height=64, steps=4,
    guidance_scale=5.0, seed=5, frames=5,
)  # fmt: skip
WHOLE = 1 << 34


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small models slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is measured, encoded and fitted once for all tests of this file."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="module")
def models(known: Path) -> Iterator[Callable[[Kind], Any]]:
    """The demo models by kind, all of them on the device."""
    catalog = media_catalog(load_settings("demo", {}))
    loaded: dict[str, Any] = {}

    def of(kind: Kind) -> Any:
        if kind not in loaded:
            loaded[kind] = load(catalog.default(kind), known)
            for part in loaded[kind].parts:
                part.wake()
        return loaded[kind]

    yield of
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def picture(known: Path) -> Reference:
    path = known / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return Reference(role="image", file=str(path), sha256=hashlib.sha256(b"x").hexdigest())


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def with_changes(params: RenderParams, **changes: Any) -> RenderParams:
    import msgspec

    return msgspec.structs.replace(params, **changes)


# --- one picture or video -------------------------------------------------------------------------


class Interrupted:
    """One model's denoising of one job, from the beginning and from any snapshot."""

    def __init__(self, model: Any, params: RenderParams, known: Path, *references: Reference):
        self.model = model
        self.params = params
        more = {"given": model.given(params, references)} if references else {}
        if "picture" in model.phases(params):
            model.see(params, more["given"])
        self._more = more
        self._texts = model.encode(params, EmbeddingCache(known / "embeddings"), **more)
        self.computed: list[int] = []  # steps, in the order in which listeners were told

    def denoised(self, course: Course) -> torch.Tensor:
        made: torch.Tensor = self.model.denoise(self.params, self._texts, course, **self._more)
        return made

    def whole(self) -> tuple[torch.Tensor, list[Snapshot]]:
        """Latents, and what each step left behind."""
        snapshots: list[Snapshot] = []

        def on_step(step: int, _: torch.Tensor) -> None:
            snapshot = course.snapshot()
            assert snapshot is not None
            snapshots.append(snapshot)

        course = Course(self.params.seed, on_step)
        return self.denoised(course), snapshots

    def goes_on(self, begin: Snapshot) -> torch.Tensor:
        """Latents after a crash: the snapshot was in a file, and the model is a fresh one."""
        file = to_bytes(Checkpoint((), begin), "job")
        read = from_bytes(file, "job").going_on
        self.computed.clear()
        return self.denoised(
            Course(self.params.seed, lambda step, _: self.computed.append(step), read)
        )


@pytest.mark.parametrize("scheduler", [None, "euler", "euler_a", "dpm++", "unipc", "ddim"])
def test_an_image_goes_on_from_every_step_with_the_same_bytes(
    scheduler: str | None, models: Callable[[Kind], Any], known: Path
) -> None:
    job = Interrupted(models("sdxl"), with_changes(IMAGE, scheduler=scheduler), known)
    latents, snapshots = job.whole()

    for step, snapshot in enumerate(snapshots, 1):
        assert snapshot.step == step
        assert sha256(job.goes_on(snapshot)) == sha256(latents)
        assert job.computed == [*range(step + 1, 7)]
    assert len(snapshots) == 6


@pytest.mark.parametrize("scheduler", ["dpm++", "unipc", "euler"])
def test_a_video_goes_on_from_every_step_with_the_same_bytes(
    scheduler: str, models: Callable[[Kind], Any], known: Path
) -> None:
    job = Interrupted(models("wan"), with_changes(VIDEO, scheduler=scheduler), known)
    latents, snapshots = job.whole()

    for snapshot in snapshots:
        assert sha256(job.goes_on(snapshot)) == sha256(latents)
        assert job.computed == [*range(snapshot.step + 1, 5)]
    assert len(snapshots) == 4


@pytest.mark.parametrize(
    ("kind", "scheduler", "mode", "role"),
    [
        ("sdxl", "euler_a", "image", "image"),
        ("sdxl", "unipc", "image", "image"),
        ("wan", "unipc", "start", "first"),
        ("wan", "dpm++", "single", "image"),
    ],
)
def test_what_is_made_with_a_picture_goes_on_with_the_same_bytes(
    kind: Kind, scheduler: str, mode: str, role: str, models: Callable[[Kind], Any], known: Path,
    picture: Reference,
) -> None:  # fmt: skip
    params = with_changes(IMAGE if kind == "sdxl" else VIDEO, scheduler=scheduler, mode=mode)
    if kind == "sdxl":
        params = with_changes(params, strength=0.7)
    sent = Reference(role=role, file=picture.file, sha256=picture.sha256)
    job = Interrupted(models(kind), params, known, sent)
    latents, snapshots = job.whole()

    for snapshot in snapshots:
        assert sha256(job.goes_on(snapshot)) == sha256(latents)
    assert len(snapshots) == params.passes == 4


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("sdxl", "euler"), ("sdxl", "euler_a"), ("sdxl", "dpm++"), ("sdxl", "unipc"),
        ("sdxl", "ddim"), ("wan", "euler"), ("wan", "dpm++"), ("wan", "unipc"),
    ],
)  # fmt: skip
def test_a_step_says_where_the_denoising_will_end(
    kind: Kind, scheduler: str, models: Callable[[Kind], Any], known: Path
) -> None:
    """Previews show that: the latents themselves are noise for most of the time."""
    params = with_changes(IMAGE if kind == "sdxl" else VIDEO, scheduler=scheduler)
    job = Interrupted(models(kind), params, known)
    expected: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def on_step(step: int, latents: torch.Tensor) -> None:
        expected.append(course.expected().clone())
        made.append(latents.clone())

    course = Course(params.seed, on_step)
    end = job.denoised(course)

    # ddim clips what it expects.
    assert (expected[-1] - end).abs().mean() < 0.1 * end.abs().mean()
    assert (expected[0] - end).abs().mean() < (made[0] - end).abs().mean()


def test_a_denoiser_computes_nothing_for_the_steps_that_are_done(
    models: Callable[[Kind], Any], known: Path
) -> None:
    model = models("sdxl")
    job = Interrupted(model, IMAGE, known)
    _, snapshots = job.whole()
    unet = model.parts["unet"].module
    block = unet.mid_block
    ran: list[int] = []
    handle = block.register_forward_hook(lambda *_: ran.append(1))

    job.goes_on(snapshots[3])
    handle.remove()

    assert len(ran) == 2
    assert "forward" not in vars(unet)
    assert "step" not in vars(model._pipeline.scheduler)


def test_a_denoiser_is_whole_again_after_an_interruption_within_the_skipped_steps(
    models: Callable[[Kind], Any], known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("sdxl")
    job = Interrupted(model, IMAGE, known)
    latents, snapshots = job.whole()
    unet, pipeline = model.parts["unet"].module, model._pipeline
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "progress_bar", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.goes_on(snapshots[2])

    assert "forward" not in vars(unet)
    assert sha256(job.whole()[0]) == sha256(latents)


def test_a_snapshot_of_another_scheduler_size_or_schedule_is_refused(
    models: Callable[[Kind], Any], known: Path
) -> None:
    model = models("sdxl")
    _, snapshots = Interrupted(model, IMAGE, known).whole()

    cases: list[tuple[dict[str, Any], Snapshot, str]] = [
        ({"scheduler": "ddim"}, snapshots[2], "scheduler"),
        ({"width": 128}, snapshots[2], "size"),
        ({"steps": 3}, snapshots[4], "schedule"),
    ]
    for changes, begin, why in cases:
        with pytest.raises(CheckpointRefused, match=why):
            Interrupted(model, with_changes(IMAGE, **changes), known).goes_on(begin)


def test_a_scheduler_with_more_than_values_in_it_has_no_snapshot(
    models: Callable[[Kind], Any], known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("sdxl")
    job = Interrupted(model, IMAGE, known)
    found: list[Snapshot | None] = []

    def on_step(step: int, _: torch.Tensor) -> None:
        monkeypatch.setattr(model._pipeline.scheduler, "noise", object(), raising=False)
        found.append(course.snapshot())

    course = Course(5, on_step)
    job.denoised(course)

    assert found == [None] * 6


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(models: Callable[[Kind], Any], known: Path) -> bytes:
    """A checkpoint of three pictures: one is done, the second has had two steps."""
    job = Interrupted(models("sdxl"), with_changes(IMAGE, scheduler="unipc"), known)
    latents, snapshots = job.whole()
    return to_bytes(Checkpoint((latents,), snapshots[1], "UniPC"), "job")


def test_a_file_gives_back_what_was_put_in(file: bytes) -> None:
    read = from_bytes(file, "job")

    assert read.going_on is not None
    assert (len(read.finished), read.step, read.scheduler_class) == (1, 2, "UniPC")
    assert read.going_on.scheduler["lower_order_nums"] == 2
    assert to_bytes(read, "job") == file


def test_a_file_that_was_cut_anywhere_is_refused(file: bytes) -> None:
    for length in range(0, len(file), 97):
        with pytest.raises(CheckpointRefused, match="damaged"):
            from_bytes(file[:length], "job")
    with pytest.raises(CheckpointRefused, match="damaged"):
        from_bytes(file + b"\0", "job")


def test_a_file_with_any_byte_damaged_is_refused(file: bytes) -> None:
    header = 8 + int.from_bytes(file[:8], "little")
    for place in (*range(header), *range(header, len(file), 11)):
        damaged = bytearray(file)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CheckpointRefused, match="damaged"):
            from_bytes(bytes(damaged), "job")


def test_a_file_of_another_job_or_version_is_refused(
    file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointRefused, match="another job"):
        from_bytes(file, "other job")
    monkeypatch.setattr(checkpoints, "versions", lambda: {"torch": "9"})
    with pytest.raises(CheckpointRefused, match="another version"):
        from_bytes(file, "job")


def test_a_failed_write_leaves_the_earlier_file(
    file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job" / "checkpoint"
    checkpoint = from_bytes(file, "job")
    checkpoints.write(path, checkpoint, "job")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        checkpoints.write(path, checkpoint, "new")

    assert [*path.parent.iterdir()] == [path]
    assert path.read_bytes() == file


def test_checkpoints_are_rare_enough_to_cost_little() -> None:
    assert not due(steps_done=1, last_at=0.0, now=4.9)
    assert due(steps_done=1, last_at=0.0, now=5.0)
    assert not due(steps_done=0, last_at=0.0, now=50.0)
    assert not due(steps_done=9, last_at=0.0, now=49.0, took_s=0.5)  # 1 % of the time, at most
    assert due(steps_done=9, last_at=0.0, now=50.0, took_s=0.5)
    assert due(steps_done=1, last_at=0.0, now=0.0, every_s=0.0, took_s=9.0)


# --- jobs -----------------------------------------------------------------------------------------


class Jobs(Bench):
    """A media engine that writes a checkpoint after every step, and what happens to it."""

    def __init__(self, state_dir: Path, budget: int = WHOLE):
        clock = count(0.0, 2.0)  # a lease is never too young to be asked for a pause
        super().__init__(state_dir, alone(budget, lambda: next(clock)))
        self.engine.checkpoint_every_s = 0.0
        self.outbox.poll = self._poll  # type: ignore[method-assign]
        self._wait = self.outbox.wait
        self.file = state_dir / "checkpoint"
        self.begin_anew()

    def begin_anew(self) -> None:
        """As for the first test."""
        self.steps_seen = 0
        self.between: Callable[[int], None] = lambda step: None
        self.outbox.wait = self._wait  # type: ignore[method-assign]
        self.outbox.waits = 0
        self.outbox.sent.clear()
        self.file.unlink(missing_ok=True)

    def _poll(self) -> None:
        self.steps_seen += 1
        self.between(self.steps_seen)

    def crashes_after(self, model: str, step: int, **more: Any) -> None:
        """A job that ends with no trace but its checkpoint, in the middle of the next step."""

        def crash(seen: int) -> None:
            if seen == step + 1:
                raise RuntimeError("a crash")

        self.between, self.steps_seen = crash, 0
        failed = self.render(model, "crashed", checkpoint=str(self.file), **more)
        assert isinstance(failed, Failed)
        self.between = lambda step: None

    def done_from_file(self, model: str, **more: Any) -> JobRendered:
        return self.done(model, "resumed", checkpoint=str(self.file), **more)

    def told(self) -> list[int]:
        """Steps of the denoising, as the last job told them."""
        found: list[int] = []
        for message in self.outbox.sent:
            if isinstance(message, Progress) and message.request_id == "resumed":
                found += [message.step] if message.phase == "denoise" else []
        return found


@pytest.fixture(scope="module")
def one_engine(known: Path) -> Jobs:
    return Jobs(known)


@pytest.fixture
def jobs(one_engine: Jobs) -> Jobs:
    one_engine.begin_anew()
    return one_engine


def test_a_job_of_several_pictures_goes_on_where_it_was(
    jobs: Jobs, every_step_is_told: None
) -> None:
    params = with_changes(IMAGE, steps=2, num_images=3, scheduler="euler_a")
    whole = jobs.done("demo-image", "whole", params=params)

    for step in range(1, 6):
        jobs.crashes_after("demo-image", step, params=params)
        jobs.outbox.sent.clear()
        done = jobs.done_from_file("demo-image", params=params)

        assert hashes(done) == hashes(whole)
        assert (done.receipt["resumed_from"], done.receipt["checkpoint"]) == (step, "resumed")
        assert jobs.told() == [*dict.fromkeys([0, *range(step, 7)])]
        assert done.receipt["scheduler_class"] == "EulerAncestralDiscreteScheduler"
        jobs.file.unlink()


def test_a_video_job_goes_on_in_an_engine_that_has_just_started(jobs: Jobs, known: Path) -> None:
    whole = jobs.done("demo-video", "whole", params=VIDEO)
    jobs.crashes_after("demo-video", 2, params=VIDEO)
    content = jobs.file.read_bytes()
    later = Jobs(known)
    later.file.write_bytes(content)

    done = later.done_from_file("demo-video", params=VIDEO)

    assert hashes(done) == hashes(whole)
    assert done.receipt["resumed_from"] == 2


def test_a_crash_after_the_denoising_leaves_only_the_decode_to_do(jobs: Jobs) -> None:
    params = with_changes(IMAGE, steps=2, num_images=2)
    whole = jobs.done("demo-image", "whole", params=params, checkpoint=str(jobs.file))
    jobs.steps_seen = 0

    again = jobs.done_from_file("demo-image", params=params)

    assert hashes(again) == hashes(whole)
    assert jobs.steps_seen == 0
    # In which way it was denoised before is told all the same.
    assert again.receipt["plan"] == whole.receipt["plan"][-2:]
    assert again.receipt["resumed_from"] == 4
    assert again.receipt["scheduler_class"] == whole.receipt["scheduler_class"]


@pytest.mark.parametrize(
    ("model", "mode", "role"), [("demo-image", "image", "image"), ("demo-video", "start", "first")]
)
def test_a_job_with_a_picture_goes_on_and_with_another_one_begins_anew(
    model: str, mode: str, role: str, jobs: Jobs, picture: Reference
) -> None:
    params = with_changes(IMAGE if model == "demo-image" else VIDEO, mode=mode)
    if mode == "image":
        params = with_changes(params, strength=0.7)
    sent = Reference(role=role, file=picture.file, sha256="a" * 64)
    whole = jobs.done(model, "whole", params=params, references=(sent,))
    jobs.crashes_after(model, 2, params=params, references=(sent,))
    content = jobs.file.read_bytes()

    done = jobs.done_from_file(model, params=params, references=(sent,))
    jobs.file.write_bytes(content)
    other = Reference(role=role, file=picture.file, sha256="b" * 64)
    anew = jobs.done_from_file(model, params=params, references=(other,))

    assert hashes(done) == hashes(whole) == hashes(anew)  # it is the same picture, after all
    assert done.receipt["resumed_from"] == 2
    assert done.receipt["references"][0]["sha256"] == "a" * 64
    assert anew.receipt["checkpoint"] == "refused: of another job"


def test_a_copy_of_which_nothing_is_denoised_has_no_steps(jobs: Jobs, picture: Reference) -> None:
    params = with_changes(IMAGE, mode="copy", strength=0.0)

    done = jobs.done("demo-image", "copy", params=params, references=(picture,))

    assert [one["phase"] for one in done.receipt["plan"]] == ["picture", "decode"]
    assert done.receipt["scheduler_class"] is None


def test_a_damaged_checkpoint_costs_the_steps_and_nothing_else(jobs: Jobs) -> None:
    params = with_changes(IMAGE, steps=3)
    whole = jobs.done("demo-image", "whole", params=params)
    jobs.crashes_after("demo-image", 2, params=params)
    good = jobs.file.read_bytes()
    damages = [good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), b"", b"\xff" * 999]

    for damage in damages:
        jobs.file.write_bytes(damage)
        done = jobs.done_from_file("demo-image", params=params)

        assert hashes(done) == hashes(whole)
        assert (done.receipt["resumed_from"], done.receipt["checkpoint"]) == (0, "refused: damaged")


@pytest.mark.parametrize(
    "changes", [{"seed": 6}, {"prompt": "a blue circle"}, {"negative_prompt": None}, {"steps": 4}]
)
def test_a_checkpoint_of_another_job_is_not_taken(jobs: Jobs, changes: dict[str, Any]) -> None:
    params = with_changes(IMAGE, steps=3)
    jobs.crashes_after("demo-image", 2, params=params)
    other = with_changes(params, **changes)

    done = jobs.done_from_file("demo-image", params=other)

    assert done.receipt["checkpoint"] == "refused: of another job"
    assert hashes(done) == hashes(jobs.done("demo-image", "whole", params=other))


def test_a_job_that_wants_no_checkpoint_writes_none(jobs: Jobs) -> None:
    done = jobs.done("demo-image", "plain", params=with_changes(IMAGE, steps=2))

    assert "checkpoint" not in done.receipt
    assert not jobs.file.exists()


def test_a_checkpoint_that_cannot_be_written_costs_no_job(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"")

    done = jobs.done(
        "demo-image", "x", params=with_changes(IMAGE, steps=2), checkpoint=str(tmp_path / "flat/c")
    )

    assert done.receipt["checkpoints_written"] == 0


# --- pauses ---------------------------------------------------------------------------------------


class Urgent:
    """Asks for the whole device at some steps of a job, as a chat would, and gives it back."""

    def __init__(self, jobs: Jobs, budget: int, steps: set[int]):
        self.held: list[int] = []  # bytes of the job's model, each time that it had the device
        self._jobs = jobs
        self._budget = budget
        self._steps = steps
        self._question: Question | None = None
        jobs.between = self._ask
        jobs.outbox.wait = self._give_back  # type: ignore[method-assign]

    def _ask(self, step: int) -> None:
        if step in self._steps:
            way = Way(name="whole", tenants=(), peak_bytes=self._budget)
            self._question = self._jobs.leases.ask("chat", "prefill", [way], priority=1)
            assert self._question.granted is None, "the denoising holds its lease"

    def _give_back(self, timeout_s: float) -> None:
        if self._question is None:  # it is the files that are waited for
            self._jobs._wait(timeout_s)
            return
        assert self._question.granted is not None, "it is its turn"
        self.held.append(self._jobs.held)
        question, self._question = self._question, None
        self._jobs.leases.release(question)


@pytest.mark.parametrize(
    ("model", "params", "budget", "steps"),
    [
        ("demo-image", with_changes(IMAGE, scheduler="unipc", num_images=2), WHOLE, {1, 6, 8, 12}),
        ("demo-image", with_changes(IMAGE, scheduler="euler_a"), 9 * MIB, {2, 3}),
        ("demo-video", with_changes(VIDEO, scheduler="dpm++"), WHOLE, {1, 2, 3}),
        ("demo-video", with_changes(VIDEO, scheduler="unipc"), WHOLE, {2}),
    ],
)
def test_a_job_that_was_paused_ends_with_the_same_bytes(
    model: str, params: RenderParams, budget: int, steps: set[int], jobs: Jobs, known: Path
) -> None:
    if budget != WHOLE:
        jobs = Jobs(known, budget)
    whole = jobs.done(model, "whole", params=params)
    urgent = Urgent(jobs, budget, steps)
    jobs.steps_seen = 0

    done = jobs.done(model, "paused", params=params)

    last = params.steps * params.num_images
    pauses = len(steps - {last})  # nobody pauses what is over
    assert hashes(done) == hashes(whole)
    assert done.receipt["paused"] == pauses
    denoise = next(one for one in done.receipt["plan"] if one["phase"] == "denoise")
    assert denoise["paused"] == pauses
    assert urgent.held[:pauses] == [0] * pauses  # everything was parked meanwhile
    phases = [m.phase for m in jobs.outbox.sent if isinstance(m, Progress)]
    assert phases.count("wait") >= pauses


def test_a_job_that_is_cancelled_while_it_is_paused_ends(jobs: Jobs) -> None:
    ticket = Ticket(b"peer", "paused")  # type: ignore[arg-type]
    jobs.done("demo-image", "whole")
    urgent = Urgent(jobs, WHOLE, {1})
    jobs.steps_seen = 0
    give_back = jobs.outbox.wait

    def cancel(timeout_s: float) -> None:
        jobs.engine.cancel(ticket)
        give_back(timeout_s)

    jobs.outbox.wait = cancel  # type: ignore[method-assign]
    ended = jobs.render("demo-image", "paused", params=IMAGE)

    assert isinstance(ended, Failed)
    assert ended.code == "cancelled"
    assert urgent.held == [0]
    assert jobs.steps_seen == 1


# --- cancelling -----------------------------------------------------------------------------------


class Quick:
    """Stands where a model's pipeline does: the same calls, and no work. Counts its steps."""

    def __init__(self, own: Any):
        self.scheduler = own
        self.denoiser = torch.nn.Identity()
        self.in_a_step: Callable[[], None] = lambda: None
        self.steps = 0

    def denoise(
        self, params: RenderParams, texts: Any, course: Course, given: Any = None
    ) -> torch.Tensor:
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self.scheduler.set_timesteps(params.steps)
        with course.of(self, self.denoiser) as arguments:
            latents = torch.randn(1, 4, 8, 8, generator=arguments["generator"])
            for index, at in enumerate(self.scheduler.timesteps):
                self.steps += 1
                self.in_a_step()
                scaled = self.scheduler.scale_model_input(latents, at)
                noise = self.denoiser(scaled)
                latents = self.scheduler.step(noise, at, latents, return_dict=False)[0]
                tell = arguments["callback_on_step_end"]
                latents = tell(self, index, at, {"latents": latents})["latents"]
        return latents


def test_a_cancelled_job_computes_one_more_step_at_most(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_changes(IMAGE, steps=6, num_images=2)
    jobs.done("demo-image", "first", params=with_changes(IMAGE, steps=1))
    model, chance = jobs.engine._models.get("demo-image"), Random(1)
    quick = Quick(model._own_scheduler)
    monkeypatch.setattr(model, "denoise", quick.denoise)
    later: list[int] = []

    def in_the_step(cancel: Callable[[int], None]) -> None:
        cancel(quick.steps)

    for trial in range(200):
        ticket = Ticket(b"peer", f"trial {trial}")  # type: ignore[arg-type]
        at, in_a_step = chance.randint(1, 11), chance.random() < 0.5
        quick.steps = jobs.steps_seen = 0

        def cancel(seen: int, at: int = at, ticket: Ticket = ticket) -> None:
            if seen == at:
                jobs.engine.cancel(ticket)

        jobs.between = (lambda _: None) if in_a_step else cancel
        quick.in_a_step = partial(in_the_step, cancel) if in_a_step else lambda: None
        ended: Message = jobs.render("demo-image", ticket.request_id, params=params)

        assert isinstance(ended, Failed), ended
        assert ended.code == "cancelled"
        later.append(quick.steps - at)

    assert len(later) == 200
    assert max(later) == 0  # the step in which it was told was its last
