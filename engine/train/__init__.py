"""The training loop: batches in, steps, evaluation, checkpoints, metrics out."""
