"""Context parallelism: one long sequence over several ranks, with ring attention."""
