"""Passes that a card records once and replays: no Python and no launch of single kernels between.

A forward pass of a large model is a thousand kernels, and launching them one by one takes longer
than most of them run. A recorded pass reads its tokens, places and tables from tensors at fixed
addresses, so it is recorded for a number of tokens and padded to that: for decoding alone
(`row_buckets`), where each row has one token, and for prompts with what decodes beside them
(`TOKEN_BUCKETS`). Longer passes, and those of the deterministic lane, run as they are written.

Recording costs about as much as some passes, so a shape is recorded when so many have come. What
was recorded is void when the pool or the weights have moved: `forget`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from worker.engine.chat.attention import PagedKV
from worker.engine.chat.forward import Forward
from worker.engine.chat.scheduler import Piece
from worker.engine.chat.varlen import Rows, VarlenPass, laid_out, sums
from worker.vram.phases import TOKEN_BUCKETS, row_buckets

log = logging.getLogger(__name__)

# Passes of a shape that run before it is recorded. Recording takes a run to warm up, one to record
# and what the driver does: about what so many passes lose that are not replayed.
PASSES_BEFORE = 4


class Shape(NamedTuple):
    """Of a recorded pass."""

    tokens: int
    rows: int
    single: bool  # each row has one token


def shape_for(pieces: Sequence[Piece], most_rows: int) -> Shape | None:
    """The least shape that holds these pieces; None where that is too large to be recorded.

    most_rows: sequences in a pass, at most.
    """
    if all(piece.sequence.decoding for piece in pieces):
        rows = next((one for one in row_buckets(most_rows) if one >= len(pieces)), None)
        return None if rows is None else Shape(rows, rows, single=True)
    count = sum(piece.end - piece.begin for piece in pieces)
    tokens = next((one for one in TOKEN_BUCKETS if one >= count), None)
    if tokens is None or len(pieces) > most_rows:
        return None
    return Shape(tokens, most_rows + 1, single=False)  # a row more, for padding


def can_record(config: Any) -> bool:
    """Whether a model computes the same kernels whatever its tokens are: where the rotary
    frequencies depend on the longest position, the library looks at it, which waits for the card.

    config: of the library's model.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    return "dynamic" not in str(rotary.get("rope_type", "default"))


class Recorder(Protocol):
    """Records what a device computes. One for all passes that share memory."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns what computes `work` again, on the same memory. Whether it is computed now is
        not said; it may be computed more than once. Raises what the work raises."""


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream that they ever saw."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


class CudaRecorder:
    """CUDA graphs. They share one pool of memory, which goes with the last of them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As Recorder. Other threads may use the card meanwhile."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()  # libraries make their handles and workspaces in the first run on a stream
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails may leave the other one
        replay: Callable[[], None] = graph.replay  # keeps the graph
        return replay


class _Inputs:
    """What recorded passes read, at fixed addresses, and the copy of it in host memory that is
    filled for each pass and sent as a whole."""

    def __init__(self, kv: PagedKV, tokens: int, rows: int, pages: int):
        """pages: of the longest sequence."""
        longs, ints = (tokens, tokens, tokens, rows), (rows + 1, rows + 1, rows, rows * pages)
        size = 8 * sum(longs) + 4 * sum(ints)
        self._kv = kv
        self._pages = pages
        self._sent = torch.zeros(size, dtype=torch.uint8)
        self._read = torch.zeros(size, dtype=torch.uint8, device=kv.device)
        self._host, self._device = (_parts(one, longs, ints) for one in (self._sent, self._read))
        self._tables: list[list[int]] = [[] for _ in range(rows)]  # as they lie in host memory

    def fill(self, shape: Shape, pieces: Sequence[Piece]) -> int:
        """Send these pieces. Returns how many logits they want, which come first."""
        tokens, rows, single = shape
        one = laid_out(pieces, self._kv, tokens=tokens, rows=rows, single=single)
        # All of them: what an earlier pass left there may be no place in this one.
        kept = range(rows) if single else one.sampled + [0] * (rows - len(one.sampled))
        contents = (
            one.ids, one.positions, one.slots, kept, one.begins, sums(one.lengths), one.lengths,
        )  # fmt: skip
        for place, values in zip(self._host, contents, strict=False):
            place[: len(values)] = torch.tensor(values, dtype=place.dtype)
        lying = self._host[-1].view(-1, self._pages)
        for row, table in enumerate(one.tables):
            if self._tables[row] != table:  # else it lies there from the pass before
                lying[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
                self._tables[row] = list(table)
        self._read.copy_(self._sent)  # returns when it has been sent
        return len(one.sampled)

    def of(self, shape: Shape, logits: int) -> VarlenPass:
        """The pass of a shape, with so many logits."""
        tokens, rows, single = shape
        ids, positions, slots, kept, begins, key_begins, lengths, tables = self._device
        return VarlenPass(
            self._kv,
            ids[:tokens][None],
            positions[:tokens][None],
            kept[:logits],
            Rows(
                slots=slots[:tokens],
                begins=begins[: rows + 1],
                key_begins=key_begins[: rows + 1],
                lengths=lengths[:rows],
                tables=tables.view(-1, self._pages)[:rows],
                most_tokens=1 if single else tokens,
            ),
        )


def _parts(buffer: torch.Tensor, longs: Sequence[int], ints: Sequence[int]) -> list[torch.Tensor]:
    """Bytes as so many int64 tensors and then int32 ones, of these lengths."""
    edge = 8 * sum(longs)
    return [
        *torch.split(buffer[:edge].view(torch.int64), list(longs)),
        *torch.split(buffer[edge:].view(torch.int32), list(ints)),
    ]


class PassGraphs:
    """The recorded passes of one model. Engine thread only."""

    def __init__(
        self,
        forward: Forward,
        kv: PagedKV,
        *,
        most_rows: int,
        pages: int,
        vocabulary: int,
        recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    ):
        """most_rows: sequences in a pass, at most. pages: of the longest sequence. vocabulary:
        logits of a token."""
        self._forward = forward
        self._kv = kv
        self._most_rows = most_rows
        self._pages = pages
        self._vocabulary = vocabulary
        self._make_recorder = recorder
        self._given_up = False
        self.forget()

    @property
    def recorded(self) -> int:
        return len(self._replays)

    def forget(self) -> None:
        """Before the pool or the weights move, or leave. Their memory goes back to torch."""
        self._recorder: Recorder | None = None
        self._inputs: _Inputs | None = None
        self._logits: torch.Tensor | None = None
        self._replays: dict[Shape, Callable[[], None]] = {}
        self._passes: Counter[Shape] = Counter()
        self._full = False
        self._of_compiled = self._forward.compiled

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor | None:
        """Logits (pieces that sample, vocabulary), in their order, valid until the next call; None
        where the pass has to run as it is written."""
        if self._of_compiled != self._forward.compiled:
            self.forget()  # compiled code is quicker in a recorded pass too
        shape = shape_for(pieces, self._most_rows)
        if shape is None or self._given_up:
            return None
        replay = self._replays.get(shape)
        if replay is None:
            self._passes[shape] += 1
            if self._full or self._passes[shape] <= PASSES_BEFORE:
                return None
            replay = self._recorded(shape, pieces)
            if replay is None:
                return None
        assert self._inputs is not None and self._logits is not None
        sampled = self._inputs.fill(shape, pieces)
        replay()
        return self._logits[:sampled]

    def _recorded(self, shape: Shape, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """None where it cannot be: the same logits come from the pass as it is written."""
        started = time.monotonic()
        try:
            if self._recorder is None:
                self._recorder = self._make_recorder(self._kv.device)
                tokens = max(TOKEN_BUCKETS[-1], row_buckets(self._most_rows)[-1])
                self._inputs = _Inputs(self._kv, tokens, self._most_rows + 1, self._pages)
                self._logits = torch.zeros(
                    max(2, self._most_rows), self._vocabulary,
                    dtype=self._kv.keys[0].dtype, device=self._kv.device,
                )  # fmt: skip
            assert self._inputs is not None and self._logits is not None
            self._inputs.fill(shape, pieces)
            logits = self._logits[: shape.rows] if shape.single else self._logits
            paged = self._inputs.of(shape, len(logits))
            replay = self._recorder.record(lambda: _compute(self._forward, paged, logits))
        except torch.OutOfMemoryError as exc:
            log.warning("no memory to record passes, so they run slower for now: %s", exc)
            self.forget()
            self._full = True
            return None
        except Exception:  # whatever it is: the same answers come without
            log.exception("passes of this model cannot be recorded, so they run slower")
            self.forget()
            self._given_up = True
            return None
        self._replays[shape] = replay
        log.info(
            "recorded passes of %d tokens in %d rows in %.2f s",
            shape.tokens, shape.rows, time.monotonic() - started,
        )  # fmt: skip
        return replay


def _compute(forward: Forward, paged: VarlenPass, logits: torch.Tensor) -> None:
    logits.copy_(forward(paged))
