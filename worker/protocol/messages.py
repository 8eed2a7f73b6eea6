"""What processes say to each other. Frozen, typed, versioned; nothing here knows HTTP or torch.

Fronts and the orchestrator speak first (`Hello`), engines and fronts answer with `State` twice a
second and whenever it changes. A change of meaning here needs a new VERSION: processes of two
versions refuse each other instead of guessing.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from worker.errors import WorkerError

VERSION = 7


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that crosses a process border."""


# --- both ways ---------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First message on every connection; the answer is a `State`."""

    peer: str  # role and name, such as "front chat"
    epoch: int = 0  # from the orchestrator to an engine: what its messages about memory carry


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """One served model as its engine sees it."""

    id: str
    kind: str
    status: str  # unloaded | loading | loaded | broken
    display_name: str
    weight_bytes: int = 0  # 0 while unknown
    device: str | None = None
    problem: str | None = None  # for status broken: what is wrong, where, what to run
    details: dict[str, Any] = {}  # context length, tokenizer hash … when known


class State(Message, frozen=True, kw_only=True):
    """What a process can say of itself without doing any work."""

    name: str  # "engine chat", "front media"
    pid: int
    started_at: float  # wall clock, seconds since the epoch
    status: str  # starting | loading | ready | draining | failed
    models: tuple[ModelState, ...] = ()
    active: int = 0  # requests being worked on
    waiting: int = 0
    device: str | None = None
    device_total_bytes: int = 0
    device_free_bytes: int = 0  # as the driver (or the operating system, for a CPU) says
    rss_bytes: int = 0
    counters: dict[str, int] = {}  # totals since the start
    gauges: dict[str, int] = {}  # what is held now


class Drain(Message, frozen=True, kw_only=True):
    """Take nothing new; finish what runs. From the orchestrator to a front."""

    grace_s: float


class EngineNotice(Message, frozen=True, kw_only=True):
    """What the orchestrator knows about an engine that does not answer, for the front's /health."""

    name: str
    cause: str | None  # None: it runs
    next_try_s: float | None = None  # seconds from now; None: it will not be tried again


class Failed(Message, frozen=True, kw_only=True):
    """The request with this id ends here."""

    request_id: str
    code: str  # WorkerError.code
    status: int
    error: str
    retry_after_s: float | None = None


def failed(request_id: str, error: WorkerError) -> Failed:
    """The event that carries `error` to whoever waits for the request."""
    return Failed(
        request_id=request_id,
        code=error.code,
        status=error.status,
        error=str(error),
        retry_after_s=error.retry_after_s,
    )


class Cancel(Message, frozen=True, kw_only=True):
    """Stop working on this request; its last event is a `Failed` with code "cancelled"."""

    request_id: str


# --- chat --------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. None is off; formulas and sources: docs/http-api.md#sampling."""

    max_tokens: int
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


class Generate(Message, frozen=True, kw_only=True):
    """Run a causal language model over messages, or over a raw prompt without a template."""

    request_id: str
    model: str  # catalog id
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None  # given: `messages` is empty and no template is applied
    sampling: Sampling
    schema: str | None = None  # JSON Schema, as JSON text, that the answer must follow
    deterministic: bool = False  # same bits whatever else runs; slower
    keep_alive_s: float | None = None  # the model leaves last for so long; None: its own
    stream: bool = False  # whether `Token` events are wanted before `Generated`
    deadline_s: float  # from the arrival of this message


class Render(Message, frozen=True, kw_only=True):
    """Turn messages into token ids and run nothing."""

    request_id: str
    model: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None


class Rendered(Message, frozen=True, kw_only=True):
    request_id: str
    text: str
    ids: list[int]
    template: str | None
    tokenizer_sha256: str
    context_tokens: int


class PlanChat(Message, frozen=True, kw_only=True):
    """What a `Generate` with these would take; nothing runs."""

    request_id: str
    model: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    max_tokens: int
    deterministic: bool = False


class ChatPlanned(Message, frozen=True, kw_only=True):
    """The answer to a `PlanChat`; a prompt that leaves no room is a `Failed`, as it would be."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int  # of them, whose keys and values are there already
    max_tokens: int  # that there is room for, as many as were asked for at most
    context_tokens: int
    kv_bytes: int  # of the pool, with its longest answer
    pool_bytes: int  # now; 0 while the model is not on the device
    whole_pool_bytes: int
    # From its arrival, with the model on the device and room in the pool: (from, to). None while
    # nothing was seen.
    seconds: tuple[float, float] | None


class Token(Message, frozen=True, kw_only=True):
    """New text of a running request. Concatenated, the texts are exactly the completion."""

    request_id: str
    text: str  # may be empty: a token that ends inside a character, or inside a stop string
    completion_tokens: int  # so far


class Tokens(Message, frozen=True, kw_only=True):
    """New text of several requests of one peer, from one pass."""

    tokens: tuple[Token, ...]


class Generated(Message, frozen=True, kw_only=True):
    """The end of a `Generate`."""

    request_id: str
    text: str
    finish_reason: str  # stop | length
    stop_string: str | None
    prompt_tokens: int
    completion_tokens: int  # including the end token
    receipt: dict[str, Any]
    queue_s: float
    prefill_s: float
    decode_s: float


# --- image and video ---------------------------------------------------------------------------


class WeightedTerm(msgspec.Struct, frozen=True):
    """A text that follows the prompt after a comma, and how much it counts; 1 is as usual."""

    text: str
    weight: float


class LoraUse(msgspec.Struct, frozen=True):
    """A LoRA of the catalog and how much of it is added; 1 is as it was trained."""

    id: str
    weight: float


class RenderParams(msgspec.Struct, frozen=True, kw_only=True):
    """Every effective parameter of an image or video job; nothing is filled in after this."""

    prompt: str
    negative_prompt: str | None  # None: none was sent, and none is used
    width: int  # pixels
    height: int
    steps: int
    guidance_scale: float
    seed: int  # of the first image; image i has seed + i
    num_images: int = 1
    frames: int = 1  # video: 4n + 1
    fps: int = 16
    scheduler: str | None = None  # None: the model's own
    shift: float | None = None  # flow shift of WAN schedulers
    # What the job's pictures are for. text: there are none. Of SDXL: image (begin from it), copy
    # (the same, as close as it goes), style and character (an adapter reads it). Of WAN: single
    # (what the film shows), start, end, both (its first and last frame).
    mode: str = "text"
    # image, copy: share of the noise that the picture gets, 0 is the picture itself, 1 nothing of
    # it; style, character: how much the adapter counts, 0 to 1.
    strength: float | None = None
    weighted: tuple[WeightedTerm, ...] = ()
    loras: tuple[LoraUse, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the pipelines compute with a second text."""
        return self.guidance_scale > 1

    @property
    def batch_shape(self) -> tuple[object, ...] | None:
        """Pictures of one SDXL model whose shapes are equal can be denoised in one batch; None:
        these cannot, because they begin from something of their own."""
        if self.mode != "text" or self.loras or self.frames > 1:
            return None
        return self.width, self.height, self.steps, self.guidance_scale, self.scheduler

    @property
    def nominal_steps(self) -> int:
        """Steps of the whole schedule, of which a job that begins from a picture runs the last
        ones: as many as are asked for, or the least that leave it one to run."""
        strength = self.strength if self.mode in ("image", "copy") else None
        if not strength or int(self.steps * strength) >= 1:
            return self.steps
        least = math.ceil(1 / strength)
        return least if int(least * strength) >= 1 else least + 1  # 1/49 rounds so that 49 give 0

    @property
    def passes(self) -> int:
        """Denoise steps that are computed for one picture or video."""
        if self.mode not in ("image", "copy") or self.strength is None:
            return self.steps
        return min(int(self.nominal_steps * self.strength), self.nominal_steps)


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that a job works with, fetched and checked, as it arrived."""

    role: str  # image | first | last
    file: str  # path on this machine
    sha256: str


class RenderJob(Message, frozen=True, kw_only=True):
    """Make the images or the video of a job and stage the files in `staging_dir`."""

    request_id: str  # the job id
    model: str
    output: str  # image | video
    params: RenderParams
    staging_dir: str
    exactness: str = "bit"  # the least that will do: bit | close | lossy
    priority: int = 0  # for device memory; higher goes first
    keep_alive_s: float | None = None  # the model leaves last for so long; None: its own
    next_model: str | None = None  # of the job that follows, whose parts may come meanwhile
    references: tuple[Reference, ...] = ()
    # The file of the job's checkpoint: written while it is denoised, and where it goes on from if
    # it is there. None: none is kept.
    checkpoint: str | None = None
    # Jobs, by request_id, that follow at once from the same sender and are to share this one's
    # batch. Each of them is answered by itself.
    companions: tuple[str, ...] = ()


class Progress(Message, frozen=True, kw_only=True):
    """Where a job is. Steps count over all its images."""

    request_id: str
    phase: str  # load | wait | encode | denoise | decode | save
    step: int
    steps: int
    left_s: float | None = None  # until the files are there, as far as is known
    image: int = 0  # which of the job's pictures is being made
    preview: bytes = b""  # a small WebP of it; empty: none that is new


class AssetFile(msgspec.Struct, frozen=True, kw_only=True):
    """A finished file in the job's staging folder."""

    file: str  # name inside the folder
    thumbnail: str
    type: str  # image | video
    mime_type: str
    width: int
    height: int
    seed: int
    size_bytes: int
    sha256: str
    frames: int | None = None
    fps: int | None = None
    duration_s: float | None = None
    thumbnail_sha256: str = ""  # filled in when it is published
    thumbnail_bytes: int = 0


class JobRendered(Message, frozen=True, kw_only=True):
    """The end of a `RenderJob`."""

    request_id: str
    assets: tuple[AssetFile, ...]
    receipt: dict[str, Any]
    seconds: dict[str, float]  # per phase


class JobNews(Message, frozen=True, kw_only=True):
    """From the runner to the fronts: where a job is. Its row in the journal has the rest."""

    request_id: str  # the job id
    phase: str | None  # None: it runs no more, and its row has changed
    step: int = 0
    steps: int = 0
    left_s: float | None = None
    image: int = 0
    preview: bytes = b""


class LookAgain(Message, frozen=True, kw_only=True):
    """From a front to the runner: there is a job or a wish in the journal that it has not seen."""


# --- models ------------------------------------------------------------------------------------


class LoadModel(Message, frozen=True, kw_only=True):
    request_id: str
    model: str


class UnloadModel(Message, frozen=True, kw_only=True):
    """Give the model's memory back; waits until running work is done."""

    request_id: str
    model: str


class ModelChanged(Message, frozen=True, kw_only=True):
    """The end of a `LoadModel` or `UnloadModel`."""

    request_id: str
    model: str
    changed: bool  # False: it was so already
    seconds: float


# --- device memory: between engines and the orchestrator's broker ---------------------------------


class TenantSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What sits in device memory on its own, as its engine describes it."""

    id: str  # model and part, such as "sdxl_lustify.unet"; unique on the card
    model: str
    size_bytes: int  # whole
    floor_bytes: int  # that it can work with; `size_bytes` where it cannot shrink
    host_copy: bool  # parking it copies nothing and waking it reads no file
    pinned: bool = False  # never moved for others
    priority: int = 0  # of who uses it; higher is more urgent
    keep_alive_s: float = 0.0  # after a use it is taken to be needed again for so long
    back_s: float = 0.0  # seconds until it is there again, as far as is known


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One rung of the ladder: how a phase may run, and what it takes then."""

    name: str  # whole | streamed | tiled …
    tenants: tuple[str, ...]  # that have to be resident together
    peak_bytes: int  # beside them
    longer_s: float = 0.0  # than the quickest way
    exactness: str = "bit"  # bit | close | lossy


class Declare(Message, frozen=True, kw_only=True):
    """The tenants of a model; all that were declared of it before and are not named are gone."""

    epoch: int
    model: str
    tenants: tuple[TenantSpec, ...]


class Acquire(Message, frozen=True, kw_only=True):
    """Asks for what a phase takes. The answer is `Granted` or `Refused`, maybe much later.

    It waits for as long as its engine does not take it back (`Withdraw`): the engine alone knows
    who still wants the answer, and until when.
    """

    epoch: int
    number: int  # names the question within the epoch
    request_id: str
    phase: str
    ways: tuple[Way, ...]
    priority: int = 0
    # Of tenants that shrink, by id, what this works with where that is more than their floor.
    least_bytes: dict[str, int] = {}
    standing: bool = False  # kept when it is not used, until somebody else needs it
    free_only: bool = False  # refused at once where anything would have to move for it
    pausable: bool = False  # its work can be left between two steps and gone on with: `Pause`
    model: str = ""  # of a phase whose seconds are worth learning
    pixels: int = 0  # that are computed at once; 0: not to be learned from
    work: float = 1.0  # what its seconds are proportional to beside them, such as steps


class AlsoWaits(Message, frozen=True, kw_only=True):
    """Another request that waits for the answer to the same question."""

    epoch: int
    number: int
    request_id: str


class Withdraw(Message, frozen=True, kw_only=True):
    """Nobody waits for the answer any more; one that is under way already is released."""

    epoch: int
    number: int


class Granted(Message, frozen=True, kw_only=True):
    """A lease of all bytes of `way`. Its tenants that are absent are to be brought now."""

    number: int
    fence: int  # rises with every grant; one that is void is refused
    way: int  # index
    held_bytes: dict[str, int]  # of its tenants, once they are there


class Refused(Message, frozen=True, kw_only=True):
    number: int
    error: str


class Brought(Message, frozen=True, kw_only=True):
    """A tenant of a lease is there, or could not be brought (held_bytes 0)."""

    epoch: int
    fence: int
    tenant: str
    held_bytes: int
    seconds: float


class Use(Message, frozen=True, kw_only=True):
    """Whether a lease is computed with. One that is not may be taken back by `Yield`."""

    epoch: int
    fence: int
    busy: bool
    keep_alive_s: float | None = None  # instead of the tenants' own, after this use


class Release(Message, frozen=True, kw_only=True):
    """The phase is over. Its tenants stay where they are, idle."""

    epoch: int
    fence: int
    done: bool = True  # it came to its end; else its seconds say nothing
    keep_alive_s: float | None = None  # as in Use


class Took(Message, frozen=True, kw_only=True):
    """A phase without device memory is over: its seconds, to be learned from. As in Acquire."""

    epoch: int
    model: str
    phase: str
    pixels: int
    work: float
    seconds: float


class Pause(Message, frozen=True, kw_only=True):
    """To the holder of a pausable lease: release it after the current step, because a request of
    higher priority waits, and ask again for what is left to do."""

    fence: int


class Yield(Message, frozen=True, kw_only=True):
    """Give bytes back. The answer is `Yielded`, at once where they are idle or where it is not to
    wait."""

    move: int
    tenant: str
    kind: str  # park | drop | shrink | grow
    held_bytes: int  # that it shall have then
    wait: bool = False  # where they are in use: begin nothing new with them, and yield then


class Stay(Message, frozen=True, kw_only=True):
    """An order that was put off is not needed any more, because nobody waits for room. Its answer
    is `Yielded`, with what the tenant has; one that is under way already counts."""

    move: int
    tenant: str


class Yielded(Message, frozen=True, kw_only=True):
    """held_bytes: what it has now; as before where it was in use."""

    epoch: int
    move: int  # 0: given back without being asked
    tenant: str
    held_bytes: int
    seconds: float


class ExplainQuery(Message, frozen=True, kw_only=True):
    """To the control socket: what happened to a request's memory."""

    request_id: str
    about: str  # the request, job or answer that is explained


class Explanation(Message, frozen=True, kw_only=True):
    request_id: str
    found: bool
    events: tuple[dict[str, Any], ...] = ()


class PhaseWays(msgspec.Struct, frozen=True, kw_only=True):
    """A phase of a job that is only planned. One without ways asks for nothing of the device."""

    name: str
    ways: tuple[Way, ...]
    model: str = ""
    pixels: int = 0  # as in Acquire
    work: float = 1.0
    least_bytes: dict[str, int] = {}


class PhasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a phase would get. refused: why not, and then nothing else counts."""

    name: str
    way: str
    exactness: str
    tenants: tuple[str, ...] = ()  # that are there meanwhile; what is streamed is in the peak
    tenants_bytes: int = 0
    peak_bytes: int
    free_bytes: int  # left meanwhile
    seconds: float = 0.0  # that moves, and the way instead of the quickest one, take
    # That the work itself takes, (from, to); None while nothing like it was seen since the start.
    work_s: tuple[float, float] | None = None
    moves: tuple[dict[str, Any], ...] = ()  # in order
    refused: str | None = None


class PlanQuery(Message, frozen=True, kw_only=True):
    """To the control socket: what would happen to a job's phases. Nothing is moved."""

    request_id: str
    holder: str  # the engine that would ask
    tenants: tuple[TenantSpec, ...]
    phases: tuple[PhaseWays, ...]


class Planned(Message, frozen=True, kw_only=True):
    request_id: str
    phases: tuple[PhasePlan, ...]


class LedgerQuery(Message, frozen=True, kw_only=True):
    request_id: str


class LedgerReport(Message, frozen=True, kw_only=True):
    """Who holds how much of the device, by the ledger."""

    request_id: str
    budget_bytes: int
    free_bytes: int
    tenants: tuple[dict[str, Any], ...]
    leases: tuple[dict[str, Any], ...]
    waiting: tuple[dict[str, Any], ...]
    counters: dict[str, float]
    drift: float  # of the budget, at the last quiet moment; what the ledger says less than is held


# --- the orchestrator's control socket -----------------------------------------------------------


class ChildReport(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the status table."""

    name: str
    pid: int | None
    status: str  # waiting | starting | loading | ready | draining | failed | stopped
    port: int | None = None
    models: tuple[str, ...] = ()
    rss_bytes: int = 0
    failures: int = 0
    cause: str | None = None
    next_try_s: float | None = None
    uptime_s: float = 0.0


class StatusQuery(Message, frozen=True, kw_only=True):
    request_id: str


class StatusReport(Message, frozen=True, kw_only=True):
    request_id: str
    pid: int
    profile: str
    status: str  # starting | ready | degraded | draining | stopped
    uptime_s: float
    children: tuple[ChildReport, ...]


class StopQuery(Message, frozen=True, kw_only=True):
    """Drain and stop; the answer is a `StatusReport` with status "draining"."""

    request_id: str


AnyMessage = (
    Hello
    | State
    | Drain
    | EngineNotice
    | Failed
    | Cancel
    | Generate
    | Render
    | Rendered
    | PlanChat
    | ChatPlanned
    | Token
    | Tokens
    | Generated
    | RenderJob
    | Progress
    | JobRendered
    | JobNews
    | LookAgain
    | LoadModel
    | UnloadModel
    | ModelChanged
    | Declare
    | Acquire
    | AlsoWaits
    | Withdraw
    | Granted
    | Refused
    | Brought
    | Use
    | Release
    | Took
    | Pause
    | Yield
    | Stay
    | Yielded
    | ExplainQuery
    | Explanation
    | PlanQuery
    | Planned
    | LedgerQuery
    | LedgerReport
    | StatusQuery
    | StatusReport
    | StopQuery
)
