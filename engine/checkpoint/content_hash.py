"""The content hash of a file: SHA-256 over the SHA-256 digests of its 8 MiB chunks, in order.

One stream of SHA-256 runs at 1.5 to 2 GB/s on a core with SHA instructions, slower than a good disk.  Cutting the file
into chunks makes it a two-level Merkle tree whose leaves are hashed on several threads (`hashlib` releases the
interpreter lock), and a leaf is hashed while its neighbours are being written.  Any flipped bit changes its leaf, so
the root.  An empty file has no leaves.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

CHUNK_BYTES = 8 << 20
READ_BYTES = 256 << 10

Segments = Sequence[memoryview]


def hash_segments(segments: Segments) -> bytes:
    """Digest of one chunk given as consecutive pieces of memory."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment)
    return digest.digest()


class TreeHash:
    """Hashes chunks in the background, in order.

    At most `ahead` chunks are in the air, which bounds the memory they keep alive when the source is streamed.
    """

    def __init__(self, pool: Executor, ahead: int = 8) -> None:
        self._pool = pool
        self._ahead = ahead
        self._running: deque[Future[bytes]] = deque()
        self._root = hashlib.sha256()

    def add(self, chunk: Callable[[], bytes]) -> None:
        """`chunk` computes the digest of the next chunk; it runs on the pool."""
        if len(self._running) >= self._ahead:
            self._root.update(self._running.popleft().result())
        self._running.append(self._pool.submit(chunk))

    def hexdigest(self) -> str:
        while self._running:
            self._root.update(self._running.popleft().result())
        return self._root.hexdigest()


def chunks_of(segments: Iterable[memoryview]) -> Iterable[list[memoryview]]:
    """Cuts a stream of byte segments into lists of `CHUNK_BYTES` each (the last one shorter), without copying."""
    chunk: list[memoryview] = []
    room = CHUNK_BYTES
    for segment in segments:
        while len(segment) > 0:
            part, segment = segment[:room], segment[room:]
            chunk.append(part)
            room -= len(part)
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk


def hash_file(path: Path, pool: Executor, progress: Callable[[int], None] | None = None) -> str:
    """Content hash of a file, read once.  `progress` is told the bytes of each chunk read."""
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        tree = TreeHash(pool)
        for start in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - start)
            tree.add(partial(_hash_range, descriptor, start, length, progress))
        return tree.hexdigest()


def _hash_range(descriptor: int, start: int, length: int, progress: Callable[[int], None] | None) -> bytes:
    """Reads in small steps: what was just read is still in the processor's cache when it is hashed."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), 0
    while done < length:
        got = os.preadv(descriptor, [buffer[:length - done]], start + done)
        if got == 0:
            break                                   # the file has become shorter, so its hash will not fit
        digest.update(buffer[:got])
        done += got
    if progress is not None:
        progress(length)
    return digest.digest()
