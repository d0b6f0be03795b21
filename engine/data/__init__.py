"""From raw text to the exact token each rank sees: tokenizers, corpora on disk, mixtures, order, packing."""
