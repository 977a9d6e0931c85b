"""What can go wrong, split by whose turn it is to act.

    BatchClientError                 .exit_code
    ├── UsageError                   64  the command or its settings
    ├── DataError                    65  the source's data, or more failures than allowed
    ├── ServingError                 69  nothing to score with: no endpoint, no model, no Java
    ├── BrokenPromiseError           70  ours: a bug, or bits that should have been equal
    ├── StorageError                 74  the object store said no, or not in time
    ├── StoppedError                 75  stopped and resumable
    ├── CredentialsError             77  missing or refused, at storage or at an endpoint
    └── MismatchError                78  what is there is not this run

A message is one line: what was found, what was wanted, what to do. Exit codes are those of sysexits.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "STOPPED",
    "STOPPED_AT_ONCE",
    "BatchClientError",
    "BrokenPromiseError",
    "CredentialsError",
    "DataError",
    "MismatchError",
    "ServingError",
    "StoppedError",
    "StorageError",
    "UsageError",
    "in_one_line",
    "one_error",
]


def in_one_line(error: BaseException) -> str:
    """What another's error says, with its kind, as a part of a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def one_error() -> Iterator[None]:
    """Around a task group: of our errors that come out of it together, the first is raised by itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if isinstance(first, BatchClientError):
            raise first from first.__cause__  # and not from the group
        raise


class BatchClientError(Exception):
    """Any failure that this package reports; `exit_code` is what the command line ends with."""

    exit_code = 70


class UsageError(BatchClientError):
    """A flag, a setting or a combination of them that can't work."""

    exit_code = 64


class DataError(BatchClientError):
    """The source's data can't be scored, or more records failed than the run allows."""

    exit_code = 65


class ServingError(BatchClientError):
    """There is nothing to score with: no endpoint answers, no such model, no Java."""

    exit_code = 69


class BrokenPromiseError(BatchClientError):
    """A bug of ours or a promise that did not hold, such as other bytes for the same chunk."""

    exit_code = 70


class StorageError(BatchClientError):
    """The object store refused, failed for too long, or holds something unreadable."""

    exit_code = 74


STOPPED = "stopped before the end; what is finished is kept: the same command goes on from there"
STOPPED_AT_ONCE = "stopped before it scored anything; the same command begins again, or goes on with what there was"


class StoppedError(BatchClientError):
    """The run was stopped before its end; the same command goes on from there."""

    exit_code = 75


class CredentialsError(BatchClientError):
    """Credentials or a token are missing or were refused."""

    exit_code = 77


class MismatchError(BatchClientError):
    """What is at the output, at the source or behind the endpoint belongs to another run."""

    exit_code = 78
