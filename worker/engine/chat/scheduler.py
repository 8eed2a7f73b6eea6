"""What the next forward pass computes: a pure state machine over sequences and blocks.

Decoding sequences have one token each in every pass; beside them it takes prompts, in order of
arrival, in pieces where they are long. A deterministic sequence's pieces depend on its own tokens
alone, and it shares blocks only where such pieces end.

When blocks run out, the sequence that came last is parked: its keys and values move to host
memory and come back before anything new begins. The oldest one always goes on, so all end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from worker.engine.chat.cache import BLOCK_TOKENS, BlockPool, block_names, blocks_for

# A deterministic sequence's prompt is computed in chunks of this many blocks, each of them alone;
# where blocks are larger than BLOCK_TOKENS, of one that holds as many tokens or more.
CHUNK_BLOCKS = 4


def chunk_blocks(block_tokens: int) -> int:
    """Blocks of a chunk of a deterministic sequence's prompt."""
    return max(1, CHUNK_BLOCKS * BLOCK_TOKENS // block_tokens)


class TokenSequence:
    """One request's tokens and the blocks that hold their keys and values."""

    def __init__(
        self, prompt_ids: list[int], limit: int, *,
        deterministic: bool = False, block_tokens: int = BLOCK_TOKENS,
    ):  # fmt: skip
        """limit: completion tokens at most; the last one is never computed. block_tokens: of the
        pool that it goes to."""
        self.deterministic = deterministic
        self.block_tokens = block_tokens
        self.ids = list(prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.limit = limit
        self.computed = 0  # tokens at the beginning of `ids` whose keys and values are in blocks
        self.cached = 0  # tokens of the prompt that were found computed
        self.blocks: list[int] = []
        self.has_room = False  # the pool was grown for it, and keeps what it needs
        self.names: list[bytes] = []  # of the full blocks that are computed
        # Full blocks of the prompt that may be found computed. The last token never is: the
        # logits after it are needed.
        self.prompt_names = block_names(prompt_ids[:-1], kind=self.kind, block_tokens=block_tokens)

    @property
    def kind(self) -> bytes:
        """Keys and values that were computed in other shapes may differ in their last bit."""
        return b"deterministic" if self.deterministic else b""

    @property
    def decoding(self) -> bool:
        """Whether one token is left to compute, the one sampled last."""
        return len(self.ids) > self.prompt_tokens

    @property
    def most_blocks(self) -> int:
        """Blocks that it can need."""
        return blocks_for(self.prompt_tokens + self.limit - 1, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `begin` .. `end` of a sequence, computed in one pass."""

    sequence: TokenSequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the pass gives the logits after the sequence's last token."""
        return self.end == len(self.sequence.ids)


@dataclass(slots=True)
class Plan:
    """One pass. Blocks are moved first, in this order: park, resume."""

    pieces: list[Piece] = field(default_factory=list)
    park: list[tuple[TokenSequence, list[int]]] = field(
        default_factory=list
    )  # with the blocks it had
    resume: list[TokenSequence] = field(default_factory=list)  # with the blocks it has now

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.pieces or self.park or self.resume)


class Scheduler:
    """Sequences of one model in the order of arrival. Engine thread only."""

    def __init__(self, pool: BlockPool, *, max_running: int, pass_tokens: int):
        """max_running: sequences in a pass. pass_tokens: of prompts in a pass."""
        self.pool = pool
        self._max_running = max_running
        self._pass_tokens = pass_tokens
        self._waiting: deque[TokenSequence] = deque()
        self._running: list[TokenSequence] = []
        self._parked: deque[TokenSequence] = deque()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._parked)

    @property
    def parked(self) -> int:
        return len(self._parked)

    @property
    def most_blocks_kept(self) -> int:
        """That the longest may take of the sequences which have begun or have been given room."""
        given = (sequence for sequence in self._waiting if sequence.has_room)
        kept = (*self._running, *self._parked, *given)
        return max((sequence.most_blocks for sequence in kept), default=0)

    @property
    def too_long(self) -> list[TokenSequence]:
        """That wait until the pool has grown, which was shrunk below what they can need."""
        return [sequence for sequence in self._waiting if sequence.most_blocks > self.pool.count]

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter([*self._running, *self._parked, *self._waiting])

    def add(self, sequence: TokenSequence) -> None:
        """Take a sequence. The caller has seen that the whole pool holds its `most_blocks`; while
        it is shrunk below that, the sequence waits."""
        assert sequence.block_tokens == self.pool.block_tokens
        self._waiting.append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """A sequence is done or cancelled: its blocks are given back."""
        for group in (self._running, self._parked, self._waiting):
            if sequence in group:
                group.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def plan(self) -> Plan:
        """The next pass. Blocks are taken for it; nothing else has to happen for the next call."""
        plan = Plan()
        self._give_blocks_to_running(plan)
        self._resume(plan)
        room = self._pass_tokens
        for sequence in self._running:
            if not sequence.decoding and room > 0:
                room -= self._fill(plan, sequence, room)
        while room > 0 and self._begin():
            room -= self._fill(plan, self._running[-1], room)
        return plan

    def computed(self, piece: Piece) -> None:
        """A piece's keys and values are in its blocks: full ones may be shared from now on."""
        sequence = piece.sequence
        sequence.computed = piece.end
        size = sequence.block_tokens
        full = piece.end // size
        if sequence.deterministic:
            # Whole chunks of the prompt: what is behind the last one was, or would be, computed in
            # another shape.
            chunk = chunk_blocks(size)
            full = min(full, sequence.prompt_tokens // size) // chunk * chunk
        if full > len(sequence.names):
            ids = sequence.ids[: full * size]
            names = block_names(ids, sequence.names, kind=sequence.kind, block_tokens=size)
            for index in range(len(sequence.names), full):
                self.pool.name(sequence.blocks[index], names[index])
            sequence.names = names

    def distrust(self, sequence: TokenSequence) -> list[int]:
        """Its keys and values are no numbers: nobody finds its blocks any more.

        Returns those that it alone has.
        """
        return self.pool.distrust(sequence.blocks)

    def shrink_to(self, count: int) -> list[tuple[TokenSequence, list[int]]]:
        """Park the last sequences until `count` blocks hold the others. Then resize the pool.

        Raises ValueError when one that has begun, or has been given room, can need more.
        """
        most = self.most_blocks_kept
        if most > count:
            raise ValueError(f"a sequence can need {most} blocks, more than {count}")
        parked = []
        while self.pool.used > count:
            parked.append(self._park_last())
        return parked

    def moved(self, moves: dict[int, int]) -> None:
        """The pool was resized: old number -> new number of each block."""
        for sequence in self._running:
            sequence.blocks = [moves[block] for block in sequence.blocks]

    def _give_blocks_to_running(self, plan: Plan) -> None:
        """Every decoding sequence gets the block of its next token, or a later one makes room."""
        for sequence in list(self._running):
            if sequence not in self._running or not sequence.decoding:
                continue
            missing = blocks_for(len(sequence.ids), sequence.block_tokens) - len(sequence.blocks)
            while missing > self.pool.available and sequence in self._running:
                plan.park.append(self._park_last())
            if sequence in self._running:
                sequence.blocks += self.pool.take(missing)
                plan.pieces.append(Piece(sequence, sequence.computed, len(sequence.ids)))

    def _park_last(self) -> tuple[TokenSequence, list[int]]:
        sequence = self._running.pop()
        blocks, sequence.blocks = sequence.blocks, []
        self.pool.release(blocks)
        self._parked.appendleft(sequence)  # the one that came first comes back first
        return sequence, blocks

    def _resume(self, plan: Plan) -> None:
        while self._parked and len(self._running) < self._max_running and not plan.park:
            sequence = self._parked[0]
            needed = blocks_for(len(sequence.ids), sequence.block_tokens)
            # A block of air for everyone, so that it is not parked again at the next step.
            if self.pool.available < needed + len(self._running):
                return
            self._parked.popleft()
            sequence.blocks = self.pool.take(needed)
            self._running.append(sequence)
            plan.resume.append(sequence)
            if sequence.decoding:
                plan.pieces.append(Piece(sequence, sequence.computed, len(sequence.ids)))

    def _begin(self) -> bool:
        """Let the first waiting sequence run, if there are a place and blocks for its prompt.

        It waits for a prompt that begins alike and is being computed: then it can share that.
        """
        if not self._waiting or self._parked or len(self._running) >= self._max_running:
            return False
        # One that a shrunk pool does not hold waits until it has grown; later ones go on.
        fitting = (one for one in self._waiting if one.most_blocks <= self.pool.count)
        sequence = next(fitting, None)
        if sequence is None:
            return False
        names = sequence.prompt_names
        found = self.pool.find(names)
        coming = {
            name
            for other in self._running
            if not other.decoding
            for name in other.prompt_names[len(other.names) :]
        }
        if not coming.isdisjoint(names[len(found) : len(found) + 1]):
            return False
        shared = _begun_with(sequence, found)
        needed = blocks_for(sequence.prompt_tokens, sequence.block_tokens) - len(shared)
        uncached = self.pool.available - sum(self.pool.is_cached(block) for block in shared)
        if uncached < needed + len(self._running):
            return False
        self._waiting.remove(sequence)
        self.pool.share(shared)
        sequence.blocks = [*shared, *self.pool.take(needed)]
        sequence.names = names[: len(shared)]
        sequence.computed = sequence.cached = len(shared) * sequence.block_tokens
        self._running.append(sequence)
        return True

    def known_tokens(self, sequence: TokenSequence) -> int:
        """Of a prompt that is not begun: those whose keys and values are in blocks."""
        found = self.pool.find(sequence.prompt_names)
        return len(_begun_with(sequence, found)) * sequence.block_tokens

    def _fill(self, plan: Plan, sequence: TokenSequence, room: int) -> int:
        """As much of a prompt as the pass has room for; returns the number of tokens.

        Of a deterministic sequence it is one chunk, or nothing where a pass has less room left.
        """
        chunk = room
        if sequence.deterministic:
            chunk = chunk_blocks(sequence.block_tokens) * sequence.block_tokens
            if chunk > room and any(not piece.sequence.decoding for piece in plan.pieces):
                return 0
        end = min(sequence.computed + chunk, sequence.prompt_tokens)
        plan.pieces.append(Piece(sequence, sequence.computed, end))
        return end - sequence.computed


def _begun_with(sequence: TokenSequence, found: list[int]) -> list[int]:
    """Of the blocks that are known of a prompt, those that its sequence begins with."""
    if sequence.deterministic:  # of a last chunk that is known, the last token is not
        chunk = chunk_blocks(sequence.block_tokens)
        return found[: len(found) // chunk * chunk]
    return found
