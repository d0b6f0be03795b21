"""A shuffle without a shuffled list: pseudo-random permutations of range(n) computed one element at a time.

Shuffling n samples usually means storing n indices, built at start, saved, and rebuilt whenever anything
changes.  A Feistel network gives the same thing as arithmetic.  Write an index as a pair (left, right) with
left in Z_a and right in Z_b, a·b ≥ n, and apply rounds

    left  ← (left  + F(key_0, right)) mod a
    right ← (right + F(key_1, left))  mod b
    …

Each round changes one half by a function of the *other* half, so it can be undone whatever F is: the network is
a permutation of Z_a × Z_b, and with a good keyed F and enough rounds it looks random (Luby and Rackoff 1988).
Taking a = ⌈√n⌉ and b = ⌈n/a⌉, made even, lets a·b exceed n by little more than 2·√n.  (Even, because a rotation
of an odd number of items is an even permutation, and half of all orders would be out of reach.)  *Cycle
walking* removes the excess: apply the network again until the result is below n; the path from an element below
n must come back below n because the network is a permutation (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains").

Six rounds are enough for anything worth shuffling; the halves of a handful of items are so small that they need
more before every order is equally likely (found by chi-squared tests over thousands of keys, see the tests).

So element i costs a few multiplications, memory is a handful of keys, and nothing is ever built, saved or resumed.
"""

from __future__ import annotations

import hashlib
import struct
from math import isqrt
from typing import overload

import numpy as np
import numpy.typing as npt

NUM_ROUNDS, NUM_ROUNDS_SMALL = 6, 16
SMALL = 1024  # items
MAX_ITEMS = 2**62
_MASK = 2**64 - 1
_MULTIPLIER_0, _MULTIPLIER_1 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele, Lea and Flood 2014)


def derive_key(*parts: int | str) -> bytes:
    """A key from a name, e.g. `derive_key(seed, source, epoch)`: the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return hashlib.shake_256(text.encode()).digest(8 * NUM_ROUNDS_SMALL)


class Permutation:
    """The permutation of range(num_items) that belongs to a key from `derive_key`.

    `p(i)` takes an int or an integer array with 0 ≤ i < num_items; `p.inverse` undoes it.

    Raises:
        IndexError: outside that range.
    """

    __slots__ = ("_keys", "_num_left", "_num_right", "num_items")

    def __init__(self, num_items: int, key: bytes) -> None:
        if not 1 <= num_items <= MAX_ITEMS:
            raise ValueError(f"a permutation of {num_items} items was asked for; 1 to 2^62 can be permuted.")
        self.num_items = num_items
        num_rounds = NUM_ROUNDS if num_items >= SMALL else NUM_ROUNDS_SMALL
        self._keys = struct.unpack_from(f"<{num_rounds}Q", key)
        self._num_left = isqrt(num_items - 1) + 1
        num_right = -(-num_items // self._num_left)
        self._num_right = num_right + num_right % 2

    @overload
    def __call__(self, index: int) -> int: ...
    @overload
    def __call__(self, index: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]: ...
    def __call__(self, index: int | npt.NDArray[np.integer]) -> int | npt.NDArray[np.int64]:
        """Where the permutation sends `index`."""
        if isinstance(index, np.ndarray):
            return self._walk_array(index, inverse=False)
        if not 0 <= index < self.num_items:
            raise IndexError(f"index {index} is outside 0 to {self.num_items - 1}")
        value = self._forward(index)
        while value >= self.num_items:
            value = self._forward(value)
        return value

    @overload
    def inverse(self, value: int) -> int: ...
    @overload
    def inverse(self, value: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]: ...
    def inverse(self, value: int | npt.NDArray[np.integer]) -> int | npt.NDArray[np.int64]:
        """The index that the permutation sends to `value`."""
        if isinstance(value, np.ndarray):
            return self._walk_array(value, inverse=True)
        return int(self._walk_array(np.array([value]), inverse=True)[0])

    def _forward(self, value: int) -> int:
        """One pass through the network.  Unrolled by hand into plain integers: this runs once per training sample."""
        num_left, num_right = self._num_left, self._num_right
        left, right = divmod(value, num_right)
        keys = iter(self._keys)
        for key in keys:
            x = (right ^ key) * _MULTIPLIER_0 & _MASK
            x = (x ^ x >> 29) * _MULTIPLIER_1 & _MASK
            left = (left + (x >> 1 ^ x >> 32)) % num_left
            x = (left ^ next(keys)) * _MULTIPLIER_0 & _MASK
            x = (x ^ x >> 29) * _MULTIPLIER_1 & _MASK
            right = (right + (x >> 1 ^ x >> 32)) % num_right
        return left * num_right + right

    def _walk_array(self, values: npt.NDArray[np.integer], inverse: bool) -> npt.NDArray[np.int64]:
        if values.size and not (0 <= int(values.min()) and int(values.max()) < self.num_items):
            raise IndexError(
                f"indices {int(values.min())} to {int(values.max())} are outside 0 to {self.num_items - 1}"
            )
        network = self._backward_array if inverse else self._forward_array
        result = network(values.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(result >= self.num_items)
        while outside.size:
            result[outside] = network(result[outside])
            outside = outside[result[outside] >= self.num_items]
        return result.astype(np.int64).reshape(values.shape)

    def _forward_array(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        num_left, num_right = np.uint64(self._num_left), np.uint64(self._num_right)
        left, right = values // num_right, values % num_right
        for first, second in zip(self._keys[0::2], self._keys[1::2], strict=True):
            left = (left + _mix(right, first)) % num_left
            right = (right + _mix(left, second)) % num_right
        return left * num_right + right

    def _backward_array(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        num_left, num_right = np.uint64(self._num_left), np.uint64(self._num_right)
        left, right = values // num_right, values % num_right
        for first, second in zip(self._keys[-2::-2], self._keys[-1::-2], strict=True):
            right = (right + num_right - _mix(left, second) % num_right) % num_right
            left = (left + num_left - _mix(right, first) % num_left) % num_left
        return left * num_right + right


def _mix(half: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """The round function: two keyed multiplications and shifts, 63 bits."""
    x = (half ^ np.uint64(key)) * np.uint64(_MULTIPLIER_0)
    x = (x ^ x >> np.uint64(29)) * np.uint64(_MULTIPLIER_1)
    return x >> np.uint64(1) ^ x >> np.uint64(32)
