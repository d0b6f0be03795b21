"""Ranks, groups, collectives, random streams: everything below the model that knows there is more than one process."""
