"""Conversation files: which format they are in, one value for all of them, and their tokens on disk."""
