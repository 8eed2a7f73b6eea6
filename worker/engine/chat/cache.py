"""Which blocks of the KV pool hold what: pure bookkeeping, no tensor.

A block is some consecutive tokens of one sequence, BLOCK_TOKENS where nothing is said. Full blocks
are named by the hash of all tokens up to their end, so sequences that begin alike share them, and a
block that no sequence uses any more stays as cache until its place is needed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from worker.vram.phases import BLOCK_TOKENS as BLOCK_TOKENS


def block_names(
    ids: Sequence[int],
    known: Sequence[bytes] = (),
    *,
    kind: bytes = b"",
    block_tokens: int = BLOCK_TOKENS,
) -> list[bytes]:
    """A name for each full block of `ids`: the hash of its tokens and of all before it.

    known: names of the first blocks, computed before. kind: blocks of different kinds never have
    the same name. Cryptographic, because a collision would
    show one user's prompt to another's request.
    """
    names = list(known)
    for begin in range(len(names) * block_tokens, len(ids) - block_tokens + 1, block_tokens):
        before = names[-1] if names else kind
        tokens = array("q", ids[begin : begin + block_tokens]).tobytes()
        names.append(blake2b(before + tokens, digest_size=16).digest())
    return names


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """How many blocks hold that many tokens."""
    return -(-tokens // block_tokens)


class BlockPool:
    """Free, used and cached blocks of one model's KV pool. Engine thread only.

    Every block is in exactly one state: free, used by one or more sequences, or cached (full,
    named, and used by none). Cached blocks go least recently used first, and those with a name in
    `pinned` when there is no other.
    """

    def __init__(self, count: int, block_tokens: int = BLOCK_TOKENS):
        self.count = count
        self.block_tokens = block_tokens
        self._free = list(range(count - 1, -1, -1))  # lowest number first out
        self._users: dict[int, int] = {}  # used block -> sequences that use it
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self.pinned: frozenset[bytes] = frozenset()

    @property
    def available(self) -> int:
        """Blocks that `take` could give now."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return len(self._users)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `names`; nothing changes."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def is_cached(self, block: int) -> bool:
        """Whether a block is one of those that `available` counts, though it is known."""
        return block in self._cached

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of these blocks, used or cached."""
        for block in blocks:
            self._cached.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1

    def take(self, count: int) -> list[int]:
        """New blocks with one user each. The caller has seen that so many are `available`."""
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = self._evict()
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def name(self, block: int, name: bytes) -> None:
        """A used block is full and its keys and values are computed: others may share it.

        When another block has the name already, that one stays the shared one.
        """
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each. What nobody uses is cached if it has a name, else free.

        The last ones go first, so that of a long prompt the beginning is kept longest.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                del self._users[block]
                if block in self._name_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def distrust(self, blocks: Sequence[int]) -> list[int]:
        """Forget the names of used blocks. Returns those that have one user."""
        for block in blocks:
            if block in self._name_of:
                self._forget(block)
        return [block for block in blocks if self._users[block] == 1]

    def drop_cached(self) -> None:
        """Forget all blocks that no sequence uses."""
        for block in self._cached:
            self._forget(block)
        self._free += self._cached
        self._cached.clear()

    @property
    def filled(self) -> list[int]:
        """Blocks that are used or cached."""
        return [*self._users, *self._cached]

    def resize(self, count: int) -> dict[int, int]:
        """Another number of blocks. Returns old number -> new number of every filled block that is
        kept; in a pool that grows they are the same.

        Cached blocks are kept as far as there is room, the most recent ones. The caller has seen
        that `used` is at most `count`.
        """
        if count < self.used:
            raise ValueError(f"{self.used} blocks are used, more than {count}")
        if count >= self.count:
            self._free[:0] = range(count - 1, self.count - 1, -1)
            self.count = count
            return {block: block for block in self.filled}
        while self.used + self.cached > count:
            self._evict()
        moves = {old: new for new, old in enumerate([*sorted(self._users), *self._cached])}
        self._users = {moves[block]: users for block, users in self._users.items()}
        self._cached = OrderedDict((moves[block], None) for block in self._cached)
        self._name_of = {moves[block]: name for block, name in self._name_of.items()}
        self._block_of = {name: block for block, name in self._name_of.items()}
        self._free = list(range(count - 1, len(moves) - 1, -1))
        self.count = count
        return moves

    def check(self) -> None:
        """Every block is in one state, and names agree. AssertionError says what does not."""
        states = [*self._free, *self._users, *self._cached]
        assert sorted(states) == list(range(self.count)), "a block is lost or in two states"
        assert all(users > 0 for users in self._users.values()), "a used block has no user"
        assert {self._block_of[name] for name in self._block_of} == set(self._name_of), (
            "names and blocks disagree"
        )
        assert not set(self._free) & set(self._name_of), "a free block has a name"
        assert set(self._cached) <= set(self._name_of), "a cached block has no name"

    def _evict(self) -> int:
        unpinned = (block for block in self._cached if self._name_of[block] not in self.pinned)
        block = next(unpinned, next(iter(self._cached)))
        del self._cached[block]
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        del self._block_of[self._name_of.pop(block)]
