"""Benchmarks of learning from one's own texts."""
