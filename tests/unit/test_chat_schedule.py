"""Scheduler and block pool as a state machine, with a stand-in for the tensors: every block holds
the tokens that were written to it, so a block that is lost, shared wrongly or overwritten shows."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.chat.cache import BLOCK_TOKENS, BlockPool, block_names, blocks_for
from worker.engine.chat.scheduler import CHUNK_BLOCKS, Plan, Scheduler, TokenSequence

MAX_RUNNING, PASS_TOKENS = 4, 40
CHUNK = CHUNK_BLOCKS * BLOCK_TOKENS

# Of which lane keys and values are, the piece that they were computed in, and all text up to them.
Text = tuple[bytes, tuple[int, int], tuple[int, ...]]


def text_of(sequence: TokenSequence, at: int) -> Text:
    """What the slot of token `at` must hold.

    In the plain lane it does not matter in which piece a token was computed; in the other it has
    other bits.
    """
    piece = (0, 0)
    if sequence.deterministic:
        begin = at // CHUNK * CHUNK
        piece = (begin, min(begin + CHUNK, sequence.prompt_tokens))
        if at >= sequence.prompt_tokens:
            piece = (at, at + 1)
    return sequence.kind, piece, tuple(sequence.ids[: at + 1])


class Card:
    """Plays the runner: each slot of each block holds the whole text up to its token."""

    def __init__(self, blocks: int):
        self.whole = blocks  # of the pool; less while it is shrunk
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, max_running=MAX_RUNNING, pass_tokens=PASS_TOKENS)
        self.slots: dict[int, Text] = {}
        self.host: dict[int, list[Text | None]] = {}
        self.alive: list[TokenSequence] = []
        self.done: list[TokenSequence] = []
        self.chance = random.Random(3)

    def add(self, ids: list[int], limit: int, *, deterministic: bool = False) -> None:
        sequence = TokenSequence(ids, limit, deterministic=deterministic)
        if sequence.most_blocks > self.whole:
            return
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    def step(self) -> Plan:
        waited = self._waiting()
        plan = self.scheduler.plan()
        self._move(plan)
        self._check_who_began(waited)
        tokens = 0
        for piece in plan.pieces:
            sequence = piece.sequence
            tokens += piece.end - piece.begin
            assert piece.begin == sequence.computed
            for at in range(piece.begin, piece.end):
                self.slots[self._slot(sequence, at)] = text_of(sequence, at)
            if sequence.deterministic and not sequence.decoding:
                assert piece.begin % CHUNK == 0
                assert piece.end == min(piece.begin + CHUNK, sequence.prompt_tokens)
        assert tokens <= max(PASS_TOKENS, CHUNK) + MAX_RUNNING
        assert len(plan.pieces) <= MAX_RUNNING
        order = [piece.sequence.decoding for piece in plan.pieces]
        assert order == sorted(order, reverse=True), "decoding pieces come first"
        for piece in plan.pieces:
            sequence = piece.sequence
            seen = [self.slots[self._slot(sequence, at)] for at in range(piece.end)]
            assert seen == [text_of(sequence, at) for at in range(piece.end)]
        for piece in plan.pieces:
            self.scheduler.computed(piece)
            if piece.samples:
                self._sample(piece.sequence)
        self.pool.check()
        return plan

    def cancel(self, index: int) -> None:
        if self.alive:
            sequence = self.alive.pop(index % len(self.alive))
            self.scheduler.remove(sequence)
            self.host.pop(id(sequence), None)

    def give_room(self) -> None:
        """The pool grows for the first sequence that it is too small for."""
        if too_long := self.scheduler.too_long:
            self.resize(too_long[0].most_blocks)
            too_long[0].has_room = True

    def resize(self, blocks: int) -> None:
        """As an engine does it when it is asked to: not below what it has to keep."""
        blocks = min(max(blocks, self.scheduler.most_blocks_kept), self.whole)
        for sequence, had in self.scheduler.shrink_to(blocks):
            self._park(sequence, had)
        moves = self.pool.resize(blocks)
        self.scheduler.moved(moves)
        old, self.slots = self.slots, {}
        for slot, text in old.items():
            if slot // BLOCK_TOKENS in moves:
                new = moves[slot // BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS
                self.slots[new] = text
        self.pool.check()

    def _waiting(self) -> list[TokenSequence]:
        begun = self.scheduler.running + self.scheduler.parked
        return list(self.scheduler)[begun:]

    def _check_who_began(self, waited: list[TokenSequence]) -> None:
        """Nothing that came later goes before a sequence which has room."""
        left = self._waiting()
        began = [index for index, one in enumerate(waited) if one not in left]
        with_room = [index for index, one in enumerate(waited) if one in left and one.has_room]
        assert not began or not with_room or max(began) < min(with_room)

    def _move(self, plan: Plan) -> None:
        for sequence, had in plan.park:
            self._park(sequence, had)
        for sequence in plan.resume:
            for at, text in enumerate(self.host.pop(id(sequence), [])):
                if text is not None:
                    self.slots[self._slot(sequence, at)] = text

    def _park(self, sequence: TokenSequence, had: list[int]) -> None:
        slots = [block * BLOCK_TOKENS + at for block in had for at in range(BLOCK_TOKENS)]
        self.host[id(sequence)] = [self.slots.get(slot) for slot in slots]

    def _slot(self, sequence: TokenSequence, at: int) -> int:
        return sequence.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS

    def _sample(self, sequence: TokenSequence) -> None:
        # The last token is never computed, so a sequence has ids for one more than its blocks.
        sequence.ids.append(self.chance.randrange(3))
        if len(sequence.ids) - sequence.prompt_tokens == sequence.limit:
            self.alive.remove(sequence)
            self.scheduler.remove(sequence)
            self.done.append(sequence)


# Few different tokens and lengths around a block's, so that prompts often begin alike.
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=150) | st.integers(1, 150).map(
    lambda length: [0] * length
)
ADD = st.tuples(st.just("add"), PROMPT, st.integers(1, 40))
ADD_FIXED = st.tuples(st.just("add deterministic"), PROMPT, st.integers(1, 40))
STEP = st.tuples(st.just("step"), st.none(), st.integers(1, 12))
CANCEL = st.tuples(st.just("cancel"), st.none(), st.integers(0, 20))
RESIZE = st.tuples(st.just("resize"), st.none(), st.integers(1, 24))
ROOM = st.tuples(st.just("room"), st.none(), st.just(0))
ACTIONS = st.lists(ADD | ADD_FIXED | STEP | STEP | CANCEL | RESIZE | ROOM, max_size=40)


@settings(max_examples=400, deadline=None)
@given(blocks=st.integers(2, 24), actions=ACTIONS)
def test_no_block_is_lost_or_shared_wrongly_and_every_sequence_ends(
    blocks: int, actions: list[tuple[str, list[int] | None, int]]
) -> None:
    card = Card(blocks)
    for action, ids, number in actions:
        if ids is not None:
            card.add(ids, number, deterministic=action == "add deterministic")
        elif action == "step":
            for _ in range(number):
                card.step()
        elif action == "cancel":
            card.cancel(number)
        elif action == "room":
            card.give_room()
        else:
            card.resize(number)

    for _ in range(40 * (len(card.alive) + 1) * 3):
        card.give_room()
        card.step()
        card.resize(1)  # whatever need not be kept is asked back at once

    assert card.alive == []
    assert list(card.scheduler) == []
    assert card.pool.used == 0
    assert card.pool.available == card.pool.count


def run_out(card: Card) -> int:
    """Steps until nothing is left."""
    steps = 0
    while card.alive:
        card.step()
        steps += 1
    return steps


def test_a_prompt_that_was_computed_is_found_and_only_its_rest_computed() -> None:
    card = Card(20)
    card.add([1] * 50, 1)
    run_out(card)

    card.add([1] * 50 + [2], 1)
    plan = card.step()

    assert card.done[-1].cached == 48
    assert [(piece.begin, piece.end) for piece in plan.pieces] == [(48, 51)]


def test_a_deterministic_prompt_shares_whole_chunks_of_its_own_lane() -> None:
    card = Card(40)
    card.add([1] * 150, 1)
    run_out(card)
    found = []
    for _ in range(2):
        card.add([1] * 150, 1, deterministic=True)
        run_out(card)
        found.append(card.done[-1].cached)

    assert found == [0, 2 * CHUNK]


def test_what_an_incomplete_chunk_computed_is_shared_with_nobody() -> None:
    """Prompts of 60 and 100 tokens named blocks that one of 120 took for a whole chunk."""
    card = Card(40)
    for tokens in (60, 100, 120):
        card.add([1] * tokens, 1, deterministic=True)
        run_out(card)

    assert [sequence.cached for sequence in card.done] == [0, 0, CHUNK]


def test_the_last_token_of_a_prompt_is_computed_though_its_block_is_known() -> None:
    card = Card(20)
    for _ in range(2):
        card.add([1] * 32, 1)
        run_out(card)

    assert card.done[-1].cached == 16


def test_prompts_that_begin_alike_and_come_together_compute_it_once() -> None:
    card = Card(20)
    for last in range(3):
        card.add([1] * 32 + [last] * 4, 1)

    computed = 0
    while card.alive:
        computed += sum(piece.end - piece.begin for piece in card.step().pieces)

    assert computed == 32 + 3 * 4


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    card = Card(40)
    card.add([1] * 3, 30)
    card.step()
    card.add([2] * 200, 1)

    plans = [card.step() for _ in range(5)]

    assert [plan.pieces[0].sequence.decoding for plan in plans] == [True] * 5
    assert [plan.pieces[1].end - plan.pieces[1].begin for plan in plans] == [40] * 5


def test_when_blocks_run_out_the_one_that_came_last_is_parked_and_loses_nothing() -> None:
    card = Card(5)
    card.add([1] * 20, 40)
    card.add([2] * 20, 40)
    parked: list[TokenSequence] = []

    while card.alive:
        parked += [sequence for sequence, _ in card.step().park]

    assert [sequence.ids[0] for sequence in parked] == [2]
    assert [sequence.ids[0] for sequence in card.done] == [1, 2]


def test_parked_sequences_come_back_in_the_order_in_which_they_came() -> None:
    card = Card(9)
    for first in (1, 2, 3):
        card.add([first] * 20, 60)
    resumed: list[int] = []

    while card.alive:
        resumed += [sequence.ids[0] for sequence in card.step().resume]

    assert resumed.index(2) < resumed.index(3)
    assert [sequence.ids[0] for sequence in card.done] == [1, 2, 3]


def test_known_blocks_that_a_prompt_will_share_are_not_counted_as_room() -> None:
    card = Card(4)
    card.add([1] * 32, 1)
    run_out(card)
    card.add([2] * 17, 10)
    card.step()
    card.add([1] * 33, 1)

    plan = card.step()

    assert [piece.sequence.ids[0] for piece in plan.pieces] == [2]
    run_out(card)
    assert len(card.done) == 3


def test_the_beginning_of_a_prompt_stays_longest_in_the_cache() -> None:
    pool = BlockPool(4)
    names = block_names([1] * 64)
    blocks = pool.take(4)
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, name)
    pool.release(blocks)

    pool.take(2)

    assert len(pool.find(names)) == 2


def test_a_block_in_use_is_never_evicted() -> None:
    pool = BlockPool(3)
    names = block_names([1] * 32)
    used = pool.take(2)
    for block, name in zip(used, names, strict=True):
        pool.name(block, name)

    assert pool.available == 1
    pool.take(1)
    assert pool.find(names) == used


def test_names_depend_on_all_that_came_before() -> None:
    one, other = block_names([1] * 16 + [5] * 16), block_names([2] * 16 + [5] * 16)

    assert one[1] != other[1]
    assert block_names([1] * 16 + [5] * 16, one[:1]) == one
    assert block_names([1] * 15) == []


def test_a_pool_does_not_shrink_below_what_is_used() -> None:
    pool = BlockPool(4)
    pool.take(3)

    with pytest.raises(ValueError, match="3 blocks are used"):
        pool.resize(2)


def test_a_pool_does_not_shrink_below_what_a_sequence_can_need() -> None:
    """It was parked for ever, and nothing that came later could begin."""
    card = Card(10)
    card.add([1] * 20, 80)
    card.step()

    with pytest.raises(ValueError, match="can need 7 blocks"):
        card.scheduler.shrink_to(5)
    run_out(card)


def test_a_sequence_that_was_given_room_keeps_it_until_it_begins() -> None:
    """Else it is taken away again while others end, and the sequence asks for it for ever."""
    card = Card(30)
    for number in range(MAX_RUNNING):
        card.add([number] * 20, 5)
    card.step()
    card.resize(10)
    card.add([9] * 100, 200)
    [long] = card.scheduler.too_long
    card.give_room()

    card.resize(10)
    assert card.pool.count == long.most_blocks == 19
    with pytest.raises(ValueError, match="can need 19 blocks"):
        card.scheduler.shrink_to(18)
    run_out(card)
    card.resize(10)
    assert card.pool.count == 10


def test_blocks_that_are_distrusted_are_found_by_nobody_and_those_of_others_stay() -> None:
    card = Card(20)
    card.add([1] * 33, 1)
    run_out(card)
    for last in (2, 3):
        card.add([1] * 32 + [last] * 20, 30)
    for _ in range(3):
        card.step()
    bad, other = card.alive

    alone = card.scheduler.distrust(bad)

    assert alone == bad.blocks[2:]
    assert other.blocks[:2] == bad.blocks[:2]
    assert card.pool.find(bad.prompt_names) == []
    card.cancel(0)
    run_out(card)
    assert card.pool.used == 0


def test_blocks_for_counts_begun_blocks() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_deciding_needs_no_torch() -> None:
    code = "import sys, worker.engine.chat.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pinned_blocks_go_when_there_is_no_other_and_the_oldest_of_others_first() -> None:
    pool = BlockPool(4)
    blocks = pool.take(4)
    for block, name in zip(blocks, (b"pin", b"old", b"new", b"pin too"), strict=True):
        pool.name(block, name)
    pool.pinned = frozenset({b"pin", b"pin too"})
    for block in blocks:
        pool.release([block])

    for gone, known in (
        (b"old", (b"pin", b"new", b"pin too")),
        (b"new", (b"pin", b"pin too")),
        (b"pin", (b"pin too",)),
        (b"pin too", ()),
    ):
        pool.take(1)
        pool.check()
        assert not pool.find([gone])
        assert all(pool.find([name]) for name in known)
