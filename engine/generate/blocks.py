"""The memory of a cache in blocks of a few tokens, given out and shared like pages (Kwon et al. 2023, section 4).

A text's keys and values lie in blocks that need not be neighbours: its table names them in order, so it takes what it
has tokens for, not what it might come to have, and what it gave back fits anybody.  Samples of one prompt name the same
blocks.  Whoever is about to write into a block that others name as well takes one of its own and copies first.

Only numbers: where the values are is `engine.generate.cache`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 16


class Blocks:
    """`total` blocks, each with the number of tables that name it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))
        self._users = [0] * total

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A block for one table.

        Raises:
            IndexError: there is none; ask `num_free` before.
        """
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more table names them."""
        for block in blocks:
            self._users[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One table less names them; those that none does are free, and taken again in the order that they had."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._users[block] > 1


def blocks_for(num_tokens: int) -> int:
    """How many hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)
