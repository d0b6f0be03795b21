"""From a corpus on disk to the exact token each rank sees: tokenizers, mixtures, order, packing."""
