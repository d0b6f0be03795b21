"""Checkpoints to and from Hugging Face and megatron-core.  `docs/conversion.md` is for users.

Reading order: `names` (which tensor is which, read both ways), `hf_config` and `hf_files` (that format's two kinds of
file), `to_hf`, `from_hf`, `check` (do both compute the same?), `torch_dist` (megatron-core's files), `megatron`.
"""
