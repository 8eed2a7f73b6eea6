"""What comes out does not depend on how it got onto the device: parts resident, parked between
phases, streamed block by block, after running out of memory, from kept embeddings."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.host import Report, Ticket
from worker.engine.leases import Leases, alone
from worker.engine.media.engine import MediaEngine
from worker.engine.peaks import measure
from worker.protocol.messages import Failed, JobRendered, Message, RenderJob, RenderParams
from worker.vram.sizes import Peaks

MIB = 1 << 20
IMAGE = RenderParams(
    prompt="a red circle", negative_prompt="a square", width=64, height=64, steps=4,
    guidance_scale=5.0, seed=5, num_images=2,
)  # fmt: skip
VIDEO = RenderParams(
    prompt="a red circle moves left", negative_prompt=None, width=64, height=64, steps=2,
    guidance_scale=5.0, seed=5, frames=5,
)  # fmt: skip
CASES = {"demo-image": IMAGE, "demo-video": VIDEO}


class Outbox:
    """Keeps what an engine sends."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.engine: MediaEngine | None = None
        self.cancels: list[Ticket] = []
        self.waits = 0
        self._woken = threading.Event()

    def send(self, ticket: Ticket, message: Message) -> None:
        self.sent.append(message)

    def publish(self, report: Report) -> None:
        pass

    def poll(self) -> None:
        pass

    def wake(self) -> None:
        self._woken.set()

    def wait(self, timeout_s: float) -> None:
        self._woken.wait(timeout_s)
        self._woken.clear()
        self.waits += 1
        assert self.waits < 100, "a lease that never comes"
        assert self.engine is not None
        while self.cancels:
            self.engine.cancel(self.cancels.pop())


class Bench:
    """A media engine with the device to itself."""

    def __init__(self, state_dir: Path, leases: Leases):
        settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(state_dir)})
        self.outbox = Outbox()
        self.state_dir = state_dir
        self.leases = leases
        self.engine = MediaEngine(
            media_catalog(settings), (), 2, torch.device("cpu"), state_dir, self.outbox, leases,
            Peaks(state_dir, lambda questions: [measure(one) for one in questions]),
        )  # fmt: skip
        self.outbox.engine = self.engine

    def render(self, model: str, name: str = "job", **more: Any) -> Message:
        """The last message of one job."""
        params = more.pop("params", CASES[model])
        job = RenderJob(
            request_id=name, model=model, output="video" if params.frames > 1 else "image",
            params=params, staging_dir=str(self.state_dir / name), **more,
        )  # fmt: skip
        self.engine.submit(Ticket(b"peer", name), job)  # type: ignore[arg-type]
        while self.engine.step():
            pass
        return self.outbox.sent[-1]

    def done(self, model: str, name: str = "job", **more: Any) -> JobRendered:
        reply = self.render(model, name, **more)
        assert isinstance(reply, JobRendered), reply
        return reply

    @property
    def held(self) -> int:
        """Bytes on the device, as the parts themselves say."""
        return self.engine.report().gauges["device_bytes_held"]  # type: ignore[index]


def hashes(done: JobRendered) -> list[str]:
    return [asset.sha256 for asset in done.assets]


def steps(done: JobRendered) -> dict[str, str]:
    return {one["phase"]: one["way"] for one in done.receipt["plan"]}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small models slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """peaks.json, measured once for all tests of this file."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture
def state_dir(known: Path, tmp_path: Path) -> Iterator[Path]:
    peaks = known / "peaks.json"
    if peaks.is_file():
        (tmp_path / "peaks.json").write_bytes(peaks.read_bytes())
    yield tmp_path
    if (tmp_path / "peaks.json").is_file():
        peaks.write_bytes((tmp_path / "peaks.json").read_bytes())


@pytest.fixture(scope="module")
def resident(known: Path) -> dict[str, JobRendered]:
    """Each case with a device that holds everything."""
    bench = Bench(known, alone(1 << 34))
    return {model: bench.done(model, f"resident-{model}") for model in CASES}


@pytest.mark.parametrize(("model", "least"), [("demo-image", 12 * MIB), ("demo-video", 16 * MIB)])
def test_parts_that_leave_between_phases_come_back_as_they_were(
    model: str, least: int, state_dir: Path, resident: dict[str, JobRendered]
) -> None:
    bench = Bench(state_dir, alone(least))
    bench.engine._embeddings.get = lambda key: None  # type: ignore[method-assign]
    once, again = bench.done(model, "a"), bench.done(model, "b")

    assert hashes(once) == hashes(again) == hashes(resident[model])
    assert once.receipt["exactness"] == again.receipt["exactness"] == "bit"
    whole = sum(part.size_bytes for part in bench.engine._models.get(model).parts)
    assert 0 < bench.held <= least < whole + 3 * MIB


@pytest.mark.parametrize(
    ("model", "least", "frames"), [("demo-image", 9 * MIB, 1), ("demo-video", 18 * MIB, 17)]
)
def test_a_denoiser_that_does_not_fit_is_streamed_with_the_same_result(
    model: str, least: int, frames: int, state_dir: Path, resident: dict[str, JobRendered]
) -> None:
    params = _with(CASES[model], frames=frames)
    tight = Bench(state_dir, alone(least)).done(model, params=params)
    roomy = Bench(state_dir, alone(1 << 34)).done(model, params=params)

    assert steps(tight)["denoise"] == "streamed"
    assert steps(roomy)["denoise"] == "whole"
    assert hashes(tight) == hashes(roomy)
    assert tight.receipt["exactness"] == "bit"


def test_texts_that_were_encoded_before_need_no_encoder_even_after_a_restart(
    state_dir: Path, resident: dict[str, JobRendered]
) -> None:
    for number, expected in enumerate(("computed", "found")):
        bench = Bench(state_dir, alone(1 << 34))
        for model in CASES:
            done = bench.done(model, f"{number}-{model}")
            assert done.receipt["embeddings"] == expected
            assert ("encode" in steps(done)) == (expected == "computed")
            assert hashes(done) == hashes(resident[model])


def test_another_text_is_not_taken_for_one_that_is_known(state_dir: Path) -> None:
    bench = Bench(state_dir, alone(1 << 34))
    bench.done("demo-image", "a")
    other = bench.done("demo-image", "b", params=_with(IMAGE, negative_prompt="a circle"))

    assert other.receipt["embeddings"] == "computed"


def test_out_of_memory_climbs_to_the_next_way_and_says_so(
    state_dir: Path, resident: dict[str, JobRendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(state_dir, alone(1 << 34))
    bench.done("demo-image", "a")
    model = bench.engine._models.get("demo-image")
    denoise, tries = model.denoise, []

    def once_too_much(*args: Any, **more: Any) -> Any:
        tries.append(1)
        if len(tries) == 2:  # in the middle of the job, with the first picture's latents there
            raise torch.OutOfMemoryError("injected")
        return denoise(*args, **more)

    monkeypatch.setattr(model, "denoise", once_too_much)
    done = bench.done("demo-image", "b")

    assert {
        "phase": "denoise", "way": "streamed", "exactness": "bit", "out_of_memory": 1,
        "ways": ["whole", "streamed"],  # a picture each
    } in done.receipt["plan"]  # fmt: skip
    assert hashes(done) == hashes(resident["demo-image"])
    monkeypatch.undo()
    assert hashes(bench.done("demo-image", "c")) == hashes(resident["demo-image"])


@pytest.mark.parametrize("fails_at", [1, 2])
def test_out_of_memory_in_a_decode_keeps_the_pictures_that_are_made(
    fails_at: int, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(state_dir, alone(1 << 34))
    params = _with(IMAGE, width=320, height=320, steps=1)
    whole = bench.done("demo-image", "a", params=params, exactness="close")
    model = bench.engine._models.get("demo-image")
    decode, tries = model.decode, []

    def once_too_much(latents: Any) -> Any:
        tries.append(1)
        if len(tries) == fails_at:
            raise torch.OutOfMemoryError("injected")
        return decode(latents)

    monkeypatch.setattr(model, "decode", once_too_much)
    done = bench.done("demo-image", "b", params=params, exactness="close")

    assert steps(done)["decode"] == "tiled"
    assert len(done.assets) == 2
    same = [a == b for a, b in zip(hashes(done), hashes(whole), strict=True)]
    assert same == [fails_at == 2, False]


def test_out_of_memory_in_every_way_ends_that_job_and_no_other(
    state_dir: Path, resident: dict[str, JobRendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(state_dir, alone(1 << 34))
    bench.done("demo-image", "a")
    model = bench.engine._models.get("demo-image")

    def too_much(*args: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(model, "decode", too_much)
    failed = bench.render("demo-image", "b")
    assert isinstance(failed, Failed)
    assert failed.code == "out_of_device_memory"
    monkeypatch.undo()
    assert hashes(bench.done("demo-image", "c")) == hashes(resident["demo-image"])


def test_a_job_that_can_never_fit_is_refused_with_the_numbers(state_dir: Path) -> None:
    bench = Bench(state_dir, alone(8 * MIB))
    failed = bench.render("demo-image", params=_with(IMAGE, width=256, height=256))

    assert isinstance(failed, Failed)
    assert failed.code == "out_of_device_memory"
    assert "8.0 MiB are reachable" in failed.error
    assert bench.held <= 8 * MIB


def test_a_decode_that_may_be_tiled_is_where_it_must_and_only_where_it_may(
    state_dir: Path,
) -> None:
    large = _with(IMAGE, width=320, height=320, num_images=1)
    bench = Bench(state_dir, alone(30 * MIB))

    refused = bench.render("demo-image", "a", params=large)
    tiled = bench.done("demo-image", "b", params=large, exactness="close")

    assert isinstance(refused, Failed)
    assert steps(tiled)["decode"] == "tiled"
    assert tiled.receipt["exactness"] == "close"
    roomy = Bench(state_dir, alone(1 << 34)).done("demo-image", "c", params=large,
                                                  exactness="close")  # fmt: skip
    assert steps(roomy)["decode"] == "whole"
    assert roomy.receipt["exactness"] == "bit"
    assert hashes(roomy) != hashes(tiled)


def test_a_job_that_is_cancelled_while_it_waits_for_memory_brings_nothing(state_dir: Path) -> None:
    leases = alone(1 << 34)
    bench = Bench(state_dir, leases)
    bench.done("demo-image", "a")
    ways = leases.ask("other", "x", [_whole_device(bench)])
    assert ways.granted is not None
    held = bench.held
    bench.outbox.cancels = [Ticket(b"peer", "b")]  # type: ignore[arg-type]

    ended = bench.render("demo-image", "b", params=_with(IMAGE, prompt="something new"))

    assert isinstance(ended, Failed)
    assert ended.code == "cancelled"
    assert bench.held <= held
    leases.release(ways)
    assert isinstance(bench.render("demo-image", "c"), JobRendered)


@pytest.mark.parametrize(("budget", "comes"), [(1 << 34, True), (16 * MIB, False)])
def test_parts_of_the_next_job_come_while_this_one_computes_where_there_is_room(
    budget: int, comes: bool, state_dir: Path, resident: dict[str, JobRendered]
) -> None:
    bench = Bench(state_dir, alone(budget))
    following = bench.engine._models.ensure("demo-video")

    done = bench.done("demo-image", next_model="demo-video")

    assert following.parts["transformer"].is_whole == comes
    assert hashes(done) == hashes(resident["demo-image"])
    assert bench.held <= budget


def test_what_was_to_come_ahead_keeps_nothing_from_others_after_the_denoising(
    state_dir: Path,
) -> None:
    leases = alone(1 << 34)
    bench = Bench(state_dir, leases)
    bench.engine._models.ensure("demo-video")
    bench.done("demo-image", next_model="demo-video", params=_with(IMAGE, steps=1, num_images=1))

    question = leases.ask("probe", "x", [_whole_device(bench)])
    assert question.granted is not None


def test_what_is_unloaded_leaves_the_device_and_the_ledger(state_dir: Path) -> None:
    bench = Bench(state_dir, alone(1 << 34))
    bench.done("demo-image")
    assert bench.held > 0

    assert bench.engine._models.drop("demo-image")

    assert bench.held == 0
    question = bench.leases.ask("probe", "x", [_whole_device(bench)])
    assert question.granted is not None


def _with(params: RenderParams, **changes: Any) -> RenderParams:
    import msgspec

    return msgspec.structs.replace(params, **changes)


def _whole_device(bench: Bench) -> Any:
    """Everything that is free once what is idle has gone."""
    from worker.protocol.messages import Way

    return Way(name="whole", tenants=(), peak_bytes=1 << 34)
