"""Processes of a job: how they start, which signals reach them, and what ended them."""
