"""Optimizers over flat shards, learning-rate schedules, gradient norm and clipping."""
