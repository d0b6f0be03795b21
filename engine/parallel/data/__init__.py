"""Data parallelism and ZeRO: flat buckets of parameters, reduced, sharded and updated as one vector each."""
