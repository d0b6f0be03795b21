"""Errors meant for people.

Every message says what was asked, shows the numbers, and names the remedy.  The command line prints an `OctantError`
without a traceback and exits with its `exit_code`; anything else is a bug and keeps its traceback.
"""


class OctantError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code: int = 1


class RequestError(OctantError):
    """The request was wrong: arguments, files or data that cannot be used as asked."""

    exit_code = 2


class ConfigError(RequestError):
    """A key, a value or a combination of the configuration cannot work."""


class DataError(RequestError):
    """A corpus, an index or a tokenizer is missing, damaged, or does not fit the run."""


class CheckpointError(RequestError):
    """No checkpoint is there where one was asked for, or what is there cannot be used."""


class WorkerError(OctantError):
    """A process of the job failed; the message carries the first cause."""
