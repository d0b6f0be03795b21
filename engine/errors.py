"""Errors meant for people.

Every message says what was asked, shows the numbers, and names the remedy.  The command line prints an `OctantError`
without a traceback and exits with its `exit_code`; anything else is a bug and keeps its traceback.
"""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters and half surrogates escaped: what a file holds must not act on a terminal."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


class OctantError(Exception):
    """Base of every error a user can cause or mend.  Messages may quote whatever a file holds; they print safely."""

    exit_code: int = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


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
