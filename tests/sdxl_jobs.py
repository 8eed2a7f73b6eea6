"""Runs SDXL jobs: phase by phase, and through a media engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tests.integration.test_residency import Outbox
from worker.catalog import Catalog, ModelSpec
from worker.engine.host import Ticket
from worker.engine.leases import alone
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.media.engine import MediaEngine
from worker.engine.media.sdxl import PARTS, Given
from worker.engine.peaks import measure
from worker.protocol.messages import Message, Reference, RenderJob, RenderParams
from worker.vram.sizes import Peaks


def params(**changes: Any) -> RenderParams:
    return RenderParams(
        **{
            "prompt": "a red circle", "negative_prompt": "a square", "width": 64, "height": 64,
            "steps": 3, "guidance_scale": 5.0, "seed": 7, **changes,
        }
    )  # fmt: skip


def reference(path: Path, role: str = "image") -> Reference:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reference(role=role, file=str(path), sha256=digest)


def done(
    model: Any,
    job: RenderParams,
    folder: Path,
    references: Sequence[Reference] = (),
    *,
    streamed: bool = False,
    on_step: Callable[[int], None] = lambda _: None,
) -> tuple[list[npt.NDArray[np.uint8]], Given]:
    """The job's pictures; in each phase its own parts are on the device and no others.

    streamed: the denoiser comes block by block.
    """
    given = model.given(job, references)
    phases = model.phases(job)
    cache = EmbeddingCache(folder / "embeddings")
    if "picture" in phases:
        with there(model, phases["picture"].parts):
            model.see(job, given)
    texts = model.known_texts(job, cache)
    if texts is None:
        with there(model, phases["encode"].parts):
            texts = model.encode(job, cache, given=given)
    made = []
    with there(model, phases["denoise"].parts if "denoise" in phases else (), streamed=streamed):
        for index in range(job.num_images):
            course = Course(job.seed + index, lambda step, _: on_step(step))
            made.append(model.denoise(job, texts, course, given=given))
    with there(model, phases["decode"].parts):
        return [np.asarray(model.decode(one)) for one in made], given


@contextmanager
def there(model: Any, parts: Sequence[str], *, streamed: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        for name in parts:
            part = model.parts[name]
            if streamed:
                stack.enter_context(part.streaming())
            else:
                part.wake()
                stack.callback(part.park)
        yield


def state(model: Any) -> dict[str, dict[str, Any]]:
    """Names, modules and values of everything that is the model's."""
    kept = {}
    for name in PARTS:
        module = model.parts[name].module
        values = {key: value.clone() for key, value in module.state_dict().items()}
        hooks = {
            path: len(one._forward_hooks) + len(one._forward_pre_hooks)
            for path, one in module.named_modules()
        }
        modules = {path: id(one) for path, one in module.named_modules()}
        kept[name] = {"values": values, "hooks": hooks, "modules": modules}
    return kept


def assert_same(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    for name, kept in before.items():
        assert after[name]["modules"] == kept["modules"]
        assert after[name]["hooks"] == kept["hooks"]
        values = after[name]["values"]
        assert values.keys() == kept["values"].keys()
        for key, value in kept["values"].items():
            assert values[key].dtype == value.dtype
            assert (values[key] == value).all(), f"{name}.{key}"


def drawn(path: Path, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A red disc in the middle of white."""
    from PIL import ImageDraw

    picture = Image.new("RGB", size, "white")
    middle, radius = (size[0] // 2, size[1] // 2), min(size) // 4
    corners = [(middle[0] + sign * radius, middle[1] + sign * radius) for sign in (-1, 1)]
    ImageDraw.Draw(picture).ellipse(corners, fill=(220, 30, 30))
    picture.save(path)
    return picture


def through_engine(
    spec: ModelSpec, job: RenderParams, state_dir: Path, budget: int, **more: Any
) -> Message:
    """The answer of a media engine that has `budget` bytes of a CPU to itself."""
    outbox = Outbox()
    engine = MediaEngine(
        Catalog([spec]), (), 1, torch.device("cpu"), state_dir, outbox, alone(budget),
        Peaks(state_dir, lambda questions: [measure(one) for one in questions]),
    )  # fmt: skip
    outbox.engine = engine
    message = RenderJob(
        request_id="job", model=spec.id, output="image", params=job,
        staging_dir=str(state_dir / "job"), **more,
    )  # fmt: skip
    engine.submit(Ticket(b"peer", "job"), message)  # type: ignore[arg-type]
    while engine.step():
        pass
    return outbox.sent[-1]
