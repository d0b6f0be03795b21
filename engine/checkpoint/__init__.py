"""Checkpoints: sharded, hashed, committed by one rename, readable in any layout.  `docs/checkpoints.md` has the format.

Reading order: `pieces` (what a rank holds), `manifest` and `shard` (the two kinds of file), `folder` (names on disk),
`plan` (who writes what), `commit` (all or nothing), `write`, `read`, `resume`, `compatibility`, `reshard`.
"""
