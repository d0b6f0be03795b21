"""Conversations: one value for all formats, templates that make a text of it, and which tokens of it are learned."""
