"""How many tokens' logits exist at once (`engine.parallel.tensor.vocabulary`)."""

from __future__ import annotations

from math import ceil

# Logits of a chunk on a rank: 256 MiB in bf16, 1,024 tokens of 128k columns, which keep a GPU's products at full speed.
CHUNK_ELEMENTS = 1 << 27
ROWS = 128                                 # a chunk has a multiple of these many tokens: what products are tiled by


def rows_of_chunk(tokens: int, columns: int) -> int:
    """Tokens of a chunk, of so many whose logits have so many columns on this rank.

    As few chunks as there can be, and all of about the same size.
    """
    most = max(CHUNK_ELEMENTS // max(columns, 1) // ROWS, 1) * ROWS
    return tokens if tokens <= most else ceil(tokens / ceil(tokens / most) / ROWS) * ROWS
