"""Tensor and sequence parallelism: the layers that hold a slice, and the table of who is cut how."""
